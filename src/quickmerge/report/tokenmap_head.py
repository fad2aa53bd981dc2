"""The title and the legend of the token map picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from quickmerge.report.cells import Slots, State, summary
from quickmerge.report.fonts import drawable, heading_families
from quickmerge.report.palette import Theme, slot_color
from quickmerge.report.text import clean, one_line
from quickmerge.report.tokenmap_chips import CELL, chip, underline, write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARGIN = 22.0
_TITLE_Y, _FIRST_ROW, _ROW, _BELOW = 24.0, 48.0, 20.0, 20.0
_SAMPLE, _BAR = "token", 2  # cells
_GAP, _BETWEEN = 0.8 * CELL, 2.4 * CELL
_LEVEL = 4


class Entry(NamedTuple):
    """One entry of the legend: a state, or None for protected."""

    x: float
    y: float
    state: State | None
    words: str


def legend(slots: Slots, width: float) -> list[Entry]:
    """Return where each entry goes, in as many rows as a picture of ``width`` points asks for."""
    entries: list[tuple[State | None, str]] = []
    entries += [(state, f"{state.value} {total:,}") for state, total in slots.counts().items() if total]
    guarded = sum(cell.protected for cell in slots.cells)
    entries += [(None, f"protected {guarded:,}")] if guarded else []
    placed, x, y = [], MARGIN, _FIRST_ROW
    for state, words in entries:
        wide = (len(_SAMPLE) if state else _BAR) * CELL + _GAP + _measure(words, 9)
        if x > MARGIN and x + wide > width - MARGIN:
            x, y = MARGIN, y + _ROW
        placed.append(Entry(x, y, state, words))
        x += wide + _BETWEEN
    return placed


def height(entries: list[Entry]) -> float:
    """Return the points that title and legend take."""
    return entries[-1].y + _BELOW


def draw_head(axes: Axes, slots: Slots, title: str, entries: list[Entry], theme: Theme, width: float) -> None:
    """Draw title, summary and legend across ``width`` points."""
    facts = summary(slots)
    room = width - 2 * MARGIN - _measure(facts, 10.5, bold=True) - 2 * CELL
    words = _fitting(drawable(one_line(title, 200)), room)
    common: dict[str, Any] = {"fontweight": "bold", "va": "center"}
    axes.text(MARGIN, _TITLE_Y, words, color=theme.ink, fontsize=13, family=heading_families(), **common)
    axes.text(width - MARGIN, _TITLE_Y, facts, color=theme.accent, fontsize=10.5, ha="right", **common)
    for x, y, state, told in entries:
        sample = len(_SAMPLE) if state else _BAR
        if state is None:
            underline(axes, x, y + 4, _BAR * CELL, theme)
        else:
            chip(axes, x, y, sample, state, slot_color(0), _LEVEL, theme)
            write(axes, x, y, _SAMPLE, state, theme)
        axes.text(x + sample * CELL + _GAP, y, told, color=theme.muted, fontsize=9, va="center")


def _fitting(words: str, room: float) -> str:
    """Return as much of a title as fits into ``room`` points, with an ellipsis if that is not all."""
    if _measure(words, 13, bold=True) <= room:
        return words
    low, high = 1, len(words)  # measuring is dear: a few times, not once a letter
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _measure(words[:middle] + "…", 13, bold=True) <= room else (low, middle)
    return words[:low] + "…"


def _measure(words: str, size: float, *, bold: bool = False) -> float:
    """Return the width of ``words`` in points."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    font = FontProperties(family=heading_families(), weight="bold" if bold else "normal")
    return float(TextPath((0, 0), clean(words), size=size, prop=font).get_extents().width)
