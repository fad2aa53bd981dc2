"""Name the lines of a chart beside the lines themselves, where the names hide nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from markupsafe import Markup

from quickmerge.bench.rows import by_reducer, is_full, is_ours, overall
from quickmerge.bench.table import Row
from quickmerge.errors import QuickmergeError
from quickmerge.viz.charts import picture
from quickmerge.viz.drawing import (
    DARK,
    LIGHT,
    OTHERS,
    Theme,
    bare_axes,
    new_figure,
    note,
    plain_settings,
    save,
    suffix_of,
)
from quickmerge.viz.format import clean, number, one_line, percent, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width of an average letter and height of a line, as shares of the font size. Generous: fonts differ.
_LETTER, _HEIGHT = 0.6, 1.15
_NEAR = 5.0


@dataclass(frozen=True)
class Label:
    """A name to write once somewhere along its line."""

    text: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]
    size: float
    bold: bool


@dataclass(frozen=True)
class _Spot:
    """A place for a label: beside which point of the line, where that is, how aligned, and whether to lead there."""

    anchor: tuple[float, float]
    at: tuple[float, float]
    offset: tuple[float, float]
    ha: str
    va: str
    far: bool


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area shared with ``other``."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(wide, 0.0) * max(high, 0.0)

    def grown(self, by: float) -> Box:
        """Return the box with a border of ``by`` points added."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def holds(self, spots: Sequence[tuple[float, float]]) -> int:
        """Return how many ``spots`` lie inside."""
        return sum(self.left < x < self.right and self.bottom < y < self.top for x, y in spots)


def text_box(text: str, size: float, x: float, y: float, ha: str, va: str) -> Box:
    """Return about where ``text`` lands when it is aligned to ``(x, y)``."""
    width, height = _LETTER * size * len(text), _HEIGHT * size
    left = x - {"left": 0.0, "center": width / 2, "right": width}[ha]
    bottom = y - {"bottom": 0.0, "center": height / 2, "top": height}[va]
    return Box(left, bottom, left + width, bottom + height)


def place(axes: Axes, labels: Sequence[Label], taken: Sequence[Box]) -> None:
    """Write every label at the spot near its own line that covers the least of everything else.

    Args:
        axes: Where to write; its limits must be final.
        labels: The names, the most important last (it is placed first).
        taken: Rectangles that already hold words.
    """
    window = axes.get_window_extent()
    inside = Box(window.x0, window.y0, window.x1, window.y1)
    paths = [_spots(axes, label) for label in labels]
    boxes = list(taken)
    for index in reversed(range(len(labels))):
        label = labels[index]
        foreign = [spot for other, path in enumerate(paths) if other != index for spot in path]
        best: tuple[float, Box, _Spot] | None = None
        for order, spot in enumerate(_candidates(axes, label)):
            (x, y), ha, va = spot.at, spot.ha, spot.va
            box = text_box(label.text, label.size, x, y, ha, va)
            area = (box.right - box.left) * (box.top - box.bottom)
            cost = (
                8.0 * (area - box.overlap(inside)) / area
                + 6.0 * sum(box.overlap(other) for other in boxes) / area
                + 0.6 * box.holds(foreign)
                + 0.3 * box.holds(paths[index])
                + 0.2 * box.grown(_NEAR).holds(foreign)  # a name between two lines belongs to neither
                + 0.01 * order
            )
            if best is None or cost < best[0]:
                best = (cost, box, spot)
        assert best is not None, "a line has at least one point"
        _, box, spot = best
        boxes.append(box)
        leader = {"arrowstyle": "-", "color": label.color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            label.text,
            spot.anchor,
            xytext=spot.offset,
            textcoords="offset points",
            color=label.color,
            fontsize=label.size,
            ha=spot.ha,
            va=spot.va,
            fontweight="bold" if label.bold else "normal",
            zorder=8,
            arrowprops=leader if spot.far else None,
            annotation_clip=False,
        )


def _pixels(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.transData.transform(np.column_stack([xs, ys]))]


def _spots(axes: Axes, label: Label) -> list[tuple[float, float]]:
    """Return points every few points along the line of ``label``, so that covering it can be counted."""
    corners = _pixels(axes, label.xs, label.ys)
    spots = list(corners)
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(2, int(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 / 5))
        spots += [(x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps) for step in range(1, steps)]
    return spots


def _candidates(axes: Axes, label: Label) -> Iterator[_Spot]:
    """Return the spots to try, best first: around each measured point, starting where the lines are far apart."""
    gap = 7.0
    for of, anchor in zip(_pixels(axes, label.xs, label.ys), zip(label.xs, label.ys, strict=True), strict=True):
        for far, reach in ((False, gap), (True, 2.4 * gap), (True, 4.2 * gap)):
            for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, -1), (-1, 1), (-1, -1), (1, 1)):
                ha = {-1: "right", 0: "center", 1: "left"}[dx]
                va = {-1: "top", 0: "center", 1: "bottom"}[dy]
                yield _Spot(anchor, (of[0] + dx * reach, of[1] + dy * reach), (dx * reach, dy * reach), ha, va, far)


# What a recovery-against-cost figure shows: one line of measured points for each reducer.


Cost = Literal["flops_ratio", "prefill_seconds", "cache_ratio"]

COSTS: dict[str, str] = {
    "flops_ratio": "FLOPs to read the prompt, as a share of the full prompt",
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


# The figure that decides: how much of the document survives, against what reading it costs.


_RECOVERY = "recovery"
_FLOOR, _CEILING = -0.6, 1.6  # one reducer that went badly wrong must not squash the others
_MANY = 9
_ABOVE = 4.0  # points between an interval and the keep value over it


def pareto_chart(rows: Sequence[Row], *, x: Cost = "flops_ratio", y: str = _RECOVERY) -> Markup:
    """Return an image of recovery against cost, one line for each reducer over its keep values.

    Args:
        rows: The benchmark's rows; rows of one kind of document count only where there are no others.
        x: The cost.
        y: The benefit, with its interval under ``<y>_low`` and ``<y>_high``.
    """
    label = f"{y.capitalize()} against {COSTS.get(x, x)}, one line for each reducer"
    return picture(lambda theme: _draw(rows, x, y, title=None, dark=theme is DARK), label)


def pareto_png(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    x: Cost = "flops_ratio",
    y: str = _RECOVERY,
    title: str | None = None,
    dark: bool = False,
) -> Path:
    """Draw the figure of :func:`pareto_chart` to ``path`` (.png or .svg), on its own background, with a title."""
    suffix_of(path)
    with plain_settings(text_as_paths=True):
        name = title or f"What survives, against {COSTS.get(x, x).partition(',')[0]}"
        return save(_draw(rows, x, y, title=name, dark=dark), path)


def _draw(rows: Sequence[Row], x: Cost, y: str, *, title: str | None, dark: bool) -> Figure:
    if x not in COSTS:
        raise QuickmergeError(f"Cannot draw against {x!r}; the costs are {', '.join(COSTS)}.")
    theme = DARK if dark else LIGHT
    chosen = overall(rows)
    lines = lines_of(chosen, x, y, theme, dark=dark)
    # Only recovery has a place for the full prompt: 1 by definition.
    full = full_at(chosen, x) if y == _RECOVERY else None
    figure = new_figure(*((6.8, 4.7) if title is None else (7.6, 5.25)))
    figure.set_facecolor(theme.card)
    axes = figure.add_axes((0.09, 0.125, 0.875, 0.805 if title is None else 0.735))
    bare_axes(axes, theme)
    _limits(axes, lines, full, y)
    numbered = _numbered(lines)
    for line in lines:
        _plot(axes, line, numbered=line is numbered)
    if y == _RECOVERY:
        _landmarks(axes, full, theme)
        axes.yaxis.set_major_formatter(lambda value, _: percent(round(value, 6)))
    if x != "prefill_seconds":
        axes.xaxis.set_major_formatter(lambda value, _: percent(round(value, 6)))
    axes.set_xlabel(COSTS[x], labelpad=8)
    meaning = "recovery: the share of what the document tells the model that survives" if y == _RECOVERY else clean(y)
    note(axes, meaning, (0, 1), (0, 9), xycoords="axes fraction", color=theme.muted, fontsize=10.5)
    _name(axes, lines, theme)
    if title is not None:
        figure.text(0.09, 0.945, clean(title), color=theme.ink, fontsize=15, fontweight="bold", va="center")
    return figure


def _limits(axes: Axes, lines: Sequence[Line], full: float | None, y: str) -> None:
    costs = [point.x for line in lines for point in line.points] + ([] if full is None else [full])
    goods = [end for line in lines for point in line.points for end in (point.low, point.high)]
    low, high = min(goods), max(goods)
    if y == _RECOVERY:
        low, high = max(low, _FLOOR), max(min(high, _CEILING), 1.0)
        low = min(low, 0.9)
    room = max(high - low, 1e-9)
    axes.set_ylim(low - 0.07 * room, high + 0.11 * room)
    axes.set_xlim(0, max(costs) * 1.09 or 1.0)


def _landmarks(axes: Axes, full: float | None, theme: Theme) -> None:
    """Draw what the full prompt and no document at all would give."""
    low, high = axes.get_ylim()
    # Lines start low on the left and end high on the right, so the words stand in the other two corners.
    marks = ((1.0, "as good as the full document", 0, "left"), (0.0, "no better than no document", 1, "right"))
    for level, words, side, ha in marks:
        if low <= level <= high:
            axes.axhline(level, color=theme.faint, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
            place_at = {"xycoords": ("axes fraction", "data"), "ha": ha}
            note(axes, words, (side, level), (0, 4), color=theme.faint, fontsize=9, **place_at)
    if full is not None:
        axes.plot([full], [1.0], marker="*", markersize=13, color=theme.ink, markeredgewidth=0, zorder=6)
        note(axes, "full prompt", (full, 1.0), (0, 9), ha="center", color=theme.ink, fontsize=10, fontweight="bold")


def _plot(axes: Axes, line: Line, *, numbered: bool) -> None:
    xs, ys, lows, highs, _ = (list(column) for column in zip(*line.points, strict=True))
    width, size, depth = (2.8, 7.5, 5) if line.ours else (1.5, 5.5, 3)
    axes.vlines(xs, lows, highs, color=line.color, linewidth=width * 0.55, alpha=0.55, zorder=depth - 1)
    (drawn,) = axes.plot(xs, ys, color=line.color, linewidth=width, linestyle=line.dashes, zorder=depth)
    drawn.set(marker=line.marker, markersize=size, markeredgecolor="none")
    for order, point in enumerate(line.points if numbered else ()):
        # The first one explains what the others are, to the left so that it stays clear of them.
        words, by, ha = (share(point.keep), 0, "center") if order else (f"keep {share(point.keep)}", 9, "right")
        note(axes, words, (point.x, point.high), (by, _ABOVE), ha=ha, color=line.color, fontsize=9, zorder=7)


def _numbered(lines: Sequence[Line]) -> Line | None:
    """Return the line whose points carry their keep values: one of ours, which tells those of the others too."""
    return next((line for line in lines if line.ours), None)


def _name(axes: Axes, lines: Sequence[Line], theme: Theme) -> None:
    """Name each line beside itself; in a legend where there are too many, in a note where it lies off the axes."""
    if len(lines) > _MANY:
        for line in lines:
            axes.plot([], [], color=line.color, marker=line.marker, linestyle=line.dashes, label=line.name)
        axes.legend(loc="lower right", frameon=False, fontsize=9, labelcolor=theme.ink, ncols=2)
        return
    low, high = axes.get_ylim()
    taken, names, outside = [], [], []
    numbered = _numbered(lines)
    for line in lines:
        seen = [point for point in line.points if low <= point.y <= high]
        if not seen:
            outside.append(line.name)
            continue
        xs, ys = [point.x for point in seen], [point.y for point in seen]
        names.append(Label(line.name, line.color, xs, ys, 12.0 if line.ours else 10.0, line.ours))
        for order, point in enumerate(seen):
            (x, bottom), (_, top) = axes.transData.transform([(point.x, point.low), (point.x, point.high)])
            taken.append(Box(x - 3, bottom - 2, x + 3, top + 2))
            if line is numbered:
                taken.append(
                    text_box(
                        "12.5%" if order else "keep 12.5%", 9, x, top + _ABOVE, "center" if order else "right", "bottom"
                    )
                )
    place(axes, names, taken)
    if outside:
        words = f"off the scale: {', '.join(outside)}"
        note(axes, words, (1, 0), (-4, 5), xycoords="axes fraction", ha="right", color=theme.muted, fontsize=9)
