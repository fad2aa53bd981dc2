"""Taking a few of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeVar

__all__ = ["evenly"]

T = TypeVar("T")


def evenly(items: Sequence[T], most: int, *, at: Literal["start", "middle", "end"] = "start") -> list[T]:
    """At most ``most`` of the items at equal distances, in their order: data are often sorted by kind.

    Args:
        items: what is chosen from, as ``range(n)`` for indices; all of it where there are no more.
        most: how many, at least 1.
        at: the items are cut into as many parts of equal length. Of each this one is taken: its first, so that the very
            first is among them; the one in its middle, as far from both ends; or its last, so that the very last is.
    """
    many, count = len(items), min(most, len(items))
    place = {"start": (0, 0), "middle": (1, 0), "end": (2, 1)}
    halves, back = place[at]
    return [items[(2 * part + halves) * many // (2 * count) - back] for part in range(count)]
