"""A question of a task as a model is asked it: in one of several formats, before or behind the document, or later.

How a prompt ends decides much. In ``cue`` format it ends in the beginning of the answer, in the words of the fact that
is looked for: the friendliest way for a method that goes by what the last tokens look at. In ``bare`` format it ends in
``Answer:``, and in ``chat`` format in the chat template. There the beginning of the answer follows when the prompt has
been read, as if the model had written it, so that the same tokens are scored in all formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quickmerge.datasets.tasks import Query, Sample
from quickmerge.datasets.text import start_of
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.models.chat import around_document

__all__ = ["FORMATS", "MODES", "TaskPrompt", "lay_out"]

FORMATS = ("cue", "bare", "chat")
"""How a prompt ends: in the begun answer, in ``Answer:``, or in the chat template."""
MODES = ("last", "first", "both", "later")
"""Where the question stands: behind the document, in front of it, in both places, or behind a document that was read
before anyone asked."""


@dataclass(frozen=True)
class TaskPrompt:
    """Token ids of a prompt: what stands before the document, the document, what is behind it.

    ``lead`` comes when the prompt has been read, before the ``answer`` that is scored. What is done to the prompt may
    know neither.
    """

    before: tuple[int, ...]
    document: tuple[int, ...]
    behind: tuple[int, ...]
    lead: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def shared(self) -> tuple[int, ...]:
        """What all questions about a document have in common, unless the question comes first."""
        return self.before + self.document

    @property
    def prompt(self) -> tuple[int, ...]:
        """All that is read before the answer begins."""
        return self.before + self.document + self.behind


def lay_out(tokenizer: Any, sample: Sample, query: Query, format: str = "cue", mode: str = "last") -> TaskPrompt:
    """The prompt of one question.

    Args:
        tokenizer: with which the sample was made; in ``chat`` format with a chat template.
        sample: whose document it is.
        query: one of its questions.
        format: one of `FORMATS`.
        mode: one of `MODES`. ``last`` and ``later`` are the same tokens: it is up to the reader what is read first.

    Raises:
        QuickmergeError: there is no such format or mode, or no chat template.
    """
    for name, given, allowed in (("format", format, FORMATS), ("mode", mode, MODES)):
        if given not in allowed:
            raise QuickmergeError(
                f"{name} must be one of {', '.join(allowed)}, got {given!r}{near_match(given, allowed)}"
            )
    if format == "chat" and not getattr(tokenizer, "chat_template", None):
        raise QuickmergeError("format must be cue or bare for a tokenizer without a chat template, got 'chat'")
    asked = query.question[0].upper() + query.question[1:]
    if format == "chat":
        before, behind = around_document(tokenizer, asked, first=mode in ("first", "both"))
        behind = f"\n\n{asked}{behind}" if mode == "both" else behind
        lead = query.lead[0].upper() + query.lead[1:]
    else:
        asks = f"Question: {query.question} The answer is in the following text.\n\n"
        before = asks if mode in ("first", "both") else ""
        behind = "\n\nAnswer:" if mode == "first" else f"\n\nQuestion: {query.question}\nAnswer:"
        lead = f" {query.lead}"
        if format == "cue" and mode != "first":
            behind, lead = query.begun, ""
        elif format == "cue" and query.hint:
            # A prompt that began the answer with what was asked would ask again.
            behind, lead = f"{behind} {query.hint}", ""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(int(i) for i in tokenizer(text, add_special_tokens=False)["input_ids"]) if text else ()

    # A chat template brings its own.
    start = () if format == "chat" else tuple(start_of(tokenizer))
    return TaskPrompt(start + ids(before), sample.document, ids(behind), ids(lead), ids(query.answer))
