"""``quickmerge train``: train what a method needs, resumable at any moment."""

from __future__ import annotations

import typer

from quickmerge.calm import cli_train as calm
from quickmerge.merge.cli import train as merge
from quickmerge.merge.prior import cli as prior
from quickmerge.recognition import cli_train as recognition
from quickmerge.speculative.gumiho import cli as gumiho

app = typer.Typer(
    name="train", help="Train what a method needs. Can be killed at any moment and resumed.", no_args_is_help=True
)
app.command("prior", epilog=prior.EXAMPLE)(prior.prior)
app.command("classifier", epilog=merge.CLASSIFIER_EXAMPLE)(merge.classifier)
app.command("dynamicvit", epilog=merge.DYNAMICVIT_EXAMPLE)(merge.dynamicvit)
app.command("gumiho", epilog=gumiho.EXAMPLE)(gumiho.gumiho)
app.command("recognizer", epilog=recognition.EXAMPLE)(recognition.recognizer)
app.command("vlm", epilog=merge.VLM_EXAMPLE)(merge.vlm)
app.command("calm", epilog=calm.EXAMPLE)(calm.calm)
