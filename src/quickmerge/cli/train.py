"""``quickmerge train``: train what a method needs, resumable at any moment."""

from __future__ import annotations

import typer

from quickmerge.cli import (
    train_calm,
    train_classifier,
    train_dynamicvit,
    train_gumiho,
    train_prior,
    train_recognizer,
    train_vlm,
)

app = typer.Typer(
    name="train", help="Train what a method needs. Can be killed at any moment and resumed.", no_args_is_help=True
)
app.command("prior", epilog=train_prior.EXAMPLE)(train_prior.prior)
app.command("classifier", epilog=train_classifier.EXAMPLE)(train_classifier.classifier)
app.command("dynamicvit", epilog=train_dynamicvit.EXAMPLE)(train_dynamicvit.dynamicvit)
app.command("gumiho", epilog=train_gumiho.EXAMPLE)(train_gumiho.gumiho)
app.command("recognizer", epilog=train_recognizer.EXAMPLE)(train_recognizer.recognizer)
app.command("vlm", epilog=train_vlm.EXAMPLE)(train_vlm.vlm)
app.command("calm", epilog=train_calm.EXAMPLE)(train_calm.calm)
