"""What a row of results holds of what made it: said by whoever puts the program together.

Benchmarks of single capabilities know no recipes. So the top of the house says once how ingredients are written, and
whatever ends a benchmark asks here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["Recorder", "record_by", "record_of"]

Recorder = Callable[[Mapping[str, Any]], dict[str, Any]]
_RECORDERS: list[Recorder] = []


def record_by(recorder: Recorder) -> None:
    """Let ``recorder`` say what a row holds of its arm's ingredients, so that whoever reads it can make them again."""
    _RECORDERS[:] = [recorder]


def record_of(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a row that make ``ingredients`` again; none where nobody knows how to write them."""
    return {name: value for recorder in _RECORDERS for name, value in recorder(ingredients).items()}
