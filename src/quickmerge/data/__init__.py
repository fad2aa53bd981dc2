"""The document that ships with the library, and a question that its middle answers."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import TypedDict, cast

__all__ = ["DemoQuestion", "demo_document", "demo_question"]


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
