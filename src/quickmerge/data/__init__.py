"""What ships with the library: a document, a question that its middle answers, trained priors and draft heads."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TypedDict, cast

__all__ = [
    "GUMIHOS",
    "PRIORS",
    "SHAPES",
    "DemoQuestion",
    "demo_document",
    "demo_question",
    "shipped_gumiho",
    "shipped_prior",
    "shipped_shape",
]

PRIORS = ("smollm2-135m",)
"""Models that a trained prior is shipped for."""

GUMIHOS = ("smollm2-135m",)
"""Models that trained draft heads are shipped for."""

SHAPES = ("smollm2-135m",)
"""Models whose config is shipped, so that their shapes are known before their weights are there."""


class DemoQuestion(TypedDict):
    """A question about the shipped document."""

    question: str
    """What to ask."""
    answer: str
    """The words that a right answer holds."""
    layout: str
    """How document and question make one user message: a format string with `{document}` and `{question}`."""


def demo_document() -> str:
    """The shipped document: the handbook of an observatory that does not exist, a little over 3,000 tokens long."""
    return (files(__name__) / "demo.txt").read_text(encoding="utf-8").strip()


def demo_question() -> DemoQuestion:
    """The question about the shipped document, its answer, and the layout of the prompt."""
    return cast(DemoQuestion, json.loads((files(__name__) / "demo.json").read_text(encoding="utf-8")))


def shipped_prior(name: str) -> Path | None:
    """The folder of the trained prior that is shipped under this name, None if there is none."""
    return Path(str(files(__name__) / f"prior-{name}")) if name in PRIORS else None


def shipped_shape(name: str) -> Path | None:
    """A folder with the config of the embedded model of this name, and no weights; None if there is none."""
    return Path(str(files(__name__) / f"shape-{name}")) if name in SHAPES else None


def shipped_gumiho(name: str) -> Path | None:
    """The folder of the draft heads that are shipped for the model of this name, None if there are none."""
    return Path(str(files(__name__) / f"gumiho-{name}")) if name in GUMIHOS else None
