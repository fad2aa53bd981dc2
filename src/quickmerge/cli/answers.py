"""Asking with fewer tokens, and with all of them where that is wanted, and printing the answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from quickmerge.cli.common import one_sentence

if TYPE_CHECKING:
    from quickmerge.reducers import Reducer

A = TypeVar("A")


def print_answers(
    method: Reducer, compare: bool, ask: Callable[[Reducer | None], A], note: Callable[[A], str | None] = lambda _: None
) -> dict[str, A]:
    """Ask each way, then print the answers, and on stderr what they cost.

    Args:
        method: what tokens are reduced by.
        compare: ask the model as it is, too.
        ask: gives an answer, with ``text`` and ``stats``; of None, one with all tokens.
        note: what else to say on stderr of the answer with fewer tokens.

    Returns:
        Answers by name, ``"reduced"`` and, if compared, ``"full"``.
    """
    from rich.console import Console

    errors = Console(stderr=True)
    results: dict[str, Any] = {}
    ways = [("reduced", method), ("full", None)] if compare else [("reduced", method)]
    for name, way in ways:
        with errors.status(f"generating ({name})"), one_sentence():
            results[name] = ask(way)
    for name, way in ways:
        found = results[name]
        if compare:
            print(f"== {name} ==")
        print(found.text)
        print()
        print(found.stats, file=errors.file)
        if way is not None and (told := note(found)):
            print(told, file=errors.file)
    return results
