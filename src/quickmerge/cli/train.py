"""``quickmerge train``: train what a method needs, resumable at any moment."""

from __future__ import annotations

import typer

from quickmerge.calm import cli_train as calm
from quickmerge.console.commands import add
from quickmerge.merge.cli import train as merge
from quickmerge.merge.prior import cli as prior
from quickmerge.recognition import cli_train as recognition
from quickmerge.speculative.gumiho import cli as gumiho

app = typer.Typer(
    name="train", help="Train what a method needs. Can be killed at any moment and resumed.", no_args_is_help=True
)
add(app, "prior", prior.prior, prior.EXAMPLE)
add(app, "classifier", merge.classifier, merge.CLASSIFIER_EXAMPLE)
add(app, "dynamicvit", merge.dynamicvit, merge.DYNAMICVIT_EXAMPLE)
add(app, "gumiho", gumiho.gumiho, gumiho.EXAMPLE)
add(app, "recognizer", recognition.recognizer, recognition.EXAMPLE)
add(app, "vlm", merge.vlm, merge.VLM_EXAMPLE)
add(app, "calm", calm.calm, calm.EXAMPLE)
