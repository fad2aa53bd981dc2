"""Asking with fewer tokens, and with all of them where that is wanted, and printing the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from quickmerge.console.options import Alone, one_sentence
from quickmerge.errors import clean

A = TypeVar("A")
M = TypeVar("M")


def print_answers(
    method: M,
    compare: bool,
    ask: Callable[[M | None], A],
    note: Callable[[A], str | None] = lambda _: None,
    names: tuple[str, str] = ("reduced", "full"),
    *,
    raw: bool = False,
    alone: Alone | None = None,
) -> dict[str, A]:
    """Ask each way, then print the answers, and on stderr what they cost.

    Args:
        method: what tokens are reduced by, or another way to save.
        compare: ask the unmodified model, too.
        ask: gives an answer, with ``text`` and ``stats``; of None, one of the unmodified model.
        note: what else to say on stderr of the answer by ``method``.
        names: of the two ways.
        raw: print the answers as they are, for those who want the very bytes.
        alone: the model without anything of ours, see `one_sentence`.

    Returns:
        Answers by name: by ``method`` and, if compared, of the unmodified model.
    """
    from quickmerge.terminal import Terminal

    errors = Terminal(stderr=True)
    results: dict[str, Any] = {}
    ways = list(zip(names, (method, None), strict=True))[: 2 if compare else 1]
    for name, way in ways:
        with errors.status(f"generating ({name})"), one_sentence(alone):
            results[name] = ask(way)
    for name, way in ways:
        found = results[name]
        if compare:
            print(f"== {name} ==")
        print(found.text if raw else clean(found.text))
        print()
        print(found.stats, file=errors.file)
        if way is not None and (told := note(found)):
            print(told, file=errors.file)
    return results
