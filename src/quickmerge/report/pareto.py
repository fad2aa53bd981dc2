"""The figure that decides: how much of the document survives, against what reading it costs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.report.drawing import bare_axes, new_figure, note, plain_settings, save, suffix_of
from quickmerge.report.inline_svg import inline_svg
from quickmerge.report.labels import Box, Label, place, text_box
from quickmerge.report.numbers import percent, share
from quickmerge.report.palette import DARK, LIGHT, Theme
from quickmerge.report.pareto_lines import COSTS, Cost, Line, full_at, lines_of
from quickmerge.report.rows import Row, overall
from quickmerge.report.text import clean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RECOVERY = "recovery"
_FLOOR, _CEILING = -0.6, 1.6  # one reducer that went badly wrong must not squash the others
_MANY = 9
_ABOVE = 4.0  # points between an interval and the keep value over it


def pareto_svg(rows: Sequence[Row], *, x: Cost = "flops_ratio", y: str = _RECOVERY) -> str:
    """Return an inline SVG of recovery against cost, one line for each reducer over its keep values.

    Args:
        rows: The benchmark's rows; rows of one kind of document count only where there are no others.
        x: The cost.
        y: The benefit, with its interval under ``<y>_low`` and ``<y>_high``.
    """
    with plain_settings(text_as_paths=False):
        figure = _draw(rows, x, y, title=None, dark=False)
        return inline_svg(figure, f"{y.capitalize()} against {COSTS[x]}, one line for each reducer")


def pareto_png(
    path: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    x: Cost = "flops_ratio",
    y: str = _RECOVERY,
    title: str | None = None,
    dark: bool = False,
) -> Path:
    """Draw the figure of :func:`pareto_svg` to ``path`` (.png or .svg), on its own background, with a title."""
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
