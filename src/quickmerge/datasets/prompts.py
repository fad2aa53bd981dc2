"""Prompts to measure generation with: read from a file, or made of documents by fixed wordings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from quickmerge.errors import QuickmergeError, half_character, whole_number
from quickmerge.files import read_text

__all__ = ["TASKS", "Prompt", "Source", "Task", "document_prompts", "passage", "read_prompts"]

_LENGTHS = (500, 900, 1400)
"""Characters of a passage, in turn: a prompt of 150 to 500 tokens."""
_BREAK = re.compile(r"(?<=[.!?])\s+(?=[\"“(]?[A-Z0-9])|\n\s*\n")
"""Between two sentences or paragraphs."""
_DEFINITION = re.compile(r"^(?:    )?(?:@|def |class |async def )", re.M)


@dataclass(frozen=True)
class Prompt:
    """What the model is asked, and what ``kind`` of task that is."""

    text: str
    kind: str = "prompt"


@dataclass(frozen=True)
class Source:
    """A document that prompts are made of; ``kind`` is ``"prose"``, ``"technical"`` or ``"code"``."""

    name: str
    kind: str
    text: str


@dataclass(frozen=True)
class Task:
    """A kind of prompt: the kinds of document that it can be about, in turn, and its wordings, in turn.

    A wording may hold ``{passage}``, a piece of the document; ``{sentence}``, its first sentence; ``{word}``, a
    frequent long word in it; and ``{a}``, ``{b}``, ``{c}``, numbers of 3 to 19, 11 to 39 and 3 to 7.
    """

    about: tuple[str, ...]
    wordings: tuple[str, ...]


TASKS = {
    "question": Task(("prose", "technical"), (
        "{passage}\n\nWhat does this text say about \"{word}\"?",
        "Read this text and answer the question.\n\n{passage}\n\nQuestion: why does \"{word}\" matter here?",
    )),
    "summary": Task(("technical", "prose"), (
        "Summarise this text in three sentences.\n\n{passage}",
        "{passage}\n\nWrite a short summary of the text above.",
    )),
    "prose": Task(("prose",), (
        "Continue this text in the same style.\n\n{passage}",
        "Write the next paragraph of this story.\n\n{passage}",
    )),
    "code": Task(("code",), (
        "Continue this Python module.\n\n```python\n{passage}",
        "Write a short Python test for this code.\n\n```python\n{passage}\n```",
    )),
    "explain": Task(("code", "technical"), (
        "Explain step by step what this does.\n\n{passage}",
        "{passage}\n\nExplain the above to someone who has never programmed.",
    )),
    "list": Task(("prose", "technical"), (
        "List the five most important points of this text.\n\n{passage}",
        "{passage}\n\nMake a numbered list of the things that are named above.",
    )),
    "rewrite": Task(("prose", "technical"), (
        "Rewrite this text in plain words.\n\n{passage}",
        "Correct the spelling of this text and write it out again.\n\n{passage}",
    )),
    "numbers": Task(("prose",), (
        "Write the multiplication table of {a}, from {a} x 1 to {a} x 12, one line each.",
        "Translate this sentence into French, then into German.\n\n{sentence}",
        "A ship sails {b} miles an hour for {c} hours, then {a} hours more. How far is that? Show each step.",
        "Count from {b} to {b}0 in steps of {c} and write one number on each line.",
    )),
}  # fmt: skip
"""Every kind of prompt that `document_prompts` makes."""


def document_prompts(documents: Sequence[Source], count: int) -> list[Prompt]:
    """Make ``count`` prompts of documents, the tasks of `TASKS` in turn; the same documents give the same prompts.

    A task takes the documents that suit it in turn, by kind and then by name, and each time another passage. A task
    that no document suits is left out.

    Raises:
        ValueError: ``count`` is no whole number of at least 1.
        QuickmergeError: no document suits any task.
    """
    count = whole_number("count", count)
    suited: dict[str, list[Source]] = {}
    for name, task in TASKS.items():
        by_kind = [sorted((d for d in documents if d.kind == kind), key=lambda d: d.name) for kind in task.about]
        longest = max(map(len, by_kind))
        suited[name] = [group[i] for i in range(longest) for group in by_kind if i < len(group)]
    names = [name for name in TASKS if suited[name]]
    if not names:
        kinds = sorted({kind for task in TASKS.values() for kind in task.about})
        given = sorted({d.kind for d in documents})
        raise QuickmergeError(f"documents must hold one of the kinds {', '.join(kinds)}, got {given or 'none'}")
    prompts = []
    for number in range(count):
        name, turn = names[number % len(names)], number // len(names)
        chosen = suited[name][turn % len(suited[name])]
        prompts.append(Prompt(_word(name, turn, chosen, turn // len(suited[name])), name))
    return prompts


def _word(name: str, turn: int, source: Source, again: int) -> str:
    """One prompt: task ``name`` for the ``turn``-th time, asked ``again`` times before about this document."""
    task = TASKS[name]
    # Tasks look at different places of the same document, and so does a task that comes back to one.
    start = (0.11 * list(TASKS).index(name) + 0.37 * again) % 0.85
    piece = passage(source.text, start, _LENGTHS[turn % len(_LENGTHS)], code=source.kind == "code")
    # The number of wordings and that of kinds share a factor: turn // 2 lets each kind of document have each wording.
    wording = task.wordings[(turn + turn // len(task.wordings)) % len(task.wordings)]
    return wording.format(
        passage=piece, sentence=_BREAK.split(piece)[0], word=_frequent(piece),
        a=3 + 2 * turn % 17, b=11 + 7 * turn % 29, c=3 + turn % 5,
    )  # fmt: skip


def passage(text: str, start: float, characters: int, *, code: bool = False) -> str:
    """About ``characters`` characters, from the first sentence (in code, definition) after a share ``start`` of a text.

    It ends with a sentence, or in code with a line, where there is one to end with.
    """
    begins = _DEFINITION if code else _BREAK
    at = int(start * len(text))
    found = next((m for m in begins.finditer(text, at)), None) if at else None
    if found is not None and len(text) - found.end() >= characters // 2:
        at = found.start() if code else found.end()
    elif at:
        at = max(0, len(text) - characters)
    piece = text[at : at + characters]
    if at + characters < len(text):
        ends = [m.end() if code else m.start() for m in (re.compile(r"\n") if code else _BREAK).finditer(piece)]
        piece = piece[: ends[-1]] if ends and ends[-1] > characters // 4 else piece
    return piece.strip("\n") if code else piece.strip()


def _frequent(text: str) -> str:
    """The most frequent word of at least seven letters, the longest of several, then the first."""
    words: list[str] = re.findall(r"[a-z]{7,}", text.lower()) or re.findall(r"\w+", text.lower()) or ["this"]
    count = Counter(words)
    return max(count, key=lambda word: (count[word], len(word)))


def read_prompts(path: Path) -> list[Prompt]:
    """Read prompts, one on each line; in a ``.jsonl`` file each line is an object with ``prompt`` and perhaps ``kind``.

    Raises:
        QuickmergeError: the file can't be read, or a line is not what it should be.
    """
    prompts = []
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(line.strip()))
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            raise QuickmergeError(f"{path} must hold JSON on each line, got something else on line {number}") from None
        text, kind = (entry.get("prompt"), entry.get("kind", "prompt")) if isinstance(entry, dict) else (None, "")
        if not isinstance(text, str) or not text.strip() or not isinstance(kind, str):
            raise QuickmergeError(
                f'{path} must hold an object such as {{"prompt": "...", "kind": "..."}} on each line, '
                f"got {line.strip()[:60]!r} on line {number}"
            )
        if half_character(text) is not None:
            raise QuickmergeError(f"{path} must hold UTF-8 text, got half a character in the prompt on line {number}")
        prompts.append(Prompt(text, kind))
    return prompts
