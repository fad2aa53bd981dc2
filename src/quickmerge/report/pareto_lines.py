"""What a recovery-against-cost figure shows: one line of measured points for each reducer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal, NamedTuple

from quickmerge.errors import QuickmergeError
from quickmerge.report.numbers import number
from quickmerge.report.palette import OTHERS, Theme
from quickmerge.report.rows import Row, by_reducer, is_full, is_ours
from quickmerge.report.text import one_line

Cost = Literal["flops_ratio", "prefill_seconds", "cache_ratio"]

COSTS: dict[str, str] = {
    "flops_ratio": "compute to read the prompt, as a share of the full prompt",
    "prefill_seconds": "time to read the prompt, in seconds",
    "cache_ratio": "cache memory, as a share of the full prompt",
}
_MARKERS = ("s", "^", "D", "v", "P", "X")
_OUR_DASHES: tuple[object, ...] = ("-", (0, (7, 1.2)), (0, (3, 1.2)), (0, (1, 1)))


class Point(NamedTuple):
    """One measured point with the ends of its interval."""

    x: float
    y: float
    low: float
    high: float
    keep: float | None


@dataclass(frozen=True)
class Line:
    """The points of one reducer, smallest keep value first, and how to draw them."""

    name: str
    ours: bool
    color: str
    marker: str
    dashes: object
    points: list[Point]


def lines_of(rows: Sequence[Row], x: Cost, y: str, theme: Theme, *, dark: bool) -> list[Line]:
    """Return a line for every reducer that has points, ours last."""
    made: list[Line] = []
    for name, group in by_reducer(rows).items():
        points = [point for row in group if (point := _point(row, x, y)) is not None]
        if not points:
            continue
        ours = is_ours(name)
        order = sum(line.ours == ours for line in made)
        if ours:
            color, marker, dashes = theme.accent, "o", _OUR_DASHES[order % len(_OUR_DASHES)]
        else:
            color, marker, dashes = OTHERS[order % len(OTHERS)][dark], _MARKERS[order % len(_MARKERS)], (0, (5, 1.6))
        made.append(Line(one_line(name, 28), ours, color, marker, dashes, points))
    if not made:
        raise QuickmergeError(f"No benchmark row has both {x!r} and {y!r}, so there is nothing to draw.")
    return made


def full_at(rows: Sequence[Row], x: Cost) -> float | None:
    """Return what the full prompt costs, or None where no row tells."""
    if x != "prefill_seconds":
        return 1.0
    measured = [value for row in rows if is_full(row) and (value := number(row, x)) is not None]
    for row in rows if not measured else ():
        took, speedup = number(row, x), number(row, "prefill_speedup")
        if took is not None and speedup is not None:
            measured.append(took * speedup)
    return median(measured) if measured else None


def _point(row: Row, x: str, y: str) -> Point | None:
    at, value = number(row, x), number(row, y)
    if at is None or value is None:
        return None
    low, high = number(row, f"{y}_low"), number(row, f"{y}_high")
    ends = (value if low is None else min(low, value), value if high is None else max(high, value))
    return Point(at, value, *ends, number(row, "keep"))
