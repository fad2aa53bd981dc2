"""Draw one token of the token map picture: its fill, its text, and the marks for dropped and protected."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge.report.cells import State
from quickmerge.report.fonts import drawable, families
from quickmerge.report.palette import ON_SLOT, Theme, blend, tint_alpha
from quickmerge.report.tokenmap_layout import RETURN, width_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE = 9.5
CELL, LINE = 0.602 * SIZE, 1.72 * SIZE  # the advance of the font, and the distance of the lines, in points


def chip(axes: Axes, x: float, y: float, width: int, state: State, color: str, level: int, theme: Theme) -> None:
    """Fill ``width`` cells from ``x`` for a token in ``state``; a dropped one has no fill.

    Args:
        axes: Where to draw, in points, downwards.
        x: The left edge.
        y: The middle of the line.
        width: The number of cells.
        state: What became of the token.
        color: The colour of its slot.
        level: The strength of its tint.
        theme: The colours of the scheme.
    """
    from matplotlib.patches import FancyBboxPatch

    if state is State.DROPPED:
        return
    fills = {State.ALONE: theme.chip, State.LEADS: color, State.MERGED: blend(color, theme.card, tint_alpha(level))}
    box = (x + 0.35, y - 0.4 * LINE), width * CELL - 0.7, 0.8 * LINE
    axes.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=2", facecolor=fills[state], linewidth=0))


def write(axes: Axes, x: float, y: float, text: str, state: State, theme: Theme) -> None:
    """Write ``text`` from ``x`` on the line around ``y`` the way tokens in ``state`` look."""
    ink = {State.LEADS: ON_SLOT, State.DROPPED: theme.faint}.get(state, theme.ink)
    weight = "bold" if state in (State.ALONE, State.LEADS) else "normal"
    at = x
    # Wide characters come from another font with another advance: one by one they keep to their cells.
    for run in [text] if width_of(text) == len(text) else list(text):
        axes.text(at, y + 0.3 * SIZE, drawable(run), color=ink, fontsize=SIZE, family=families(), fontweight=weight)
        at += width_of(run) * CELL
    if state is State.DROPPED and text.strip(f" {RETURN}"):
        axes.plot([x, at], [y + 0.02 * LINE] * 2, color=theme.faint, linewidth=0.7)


def underline(axes: Axes, x: float, y: float, length: float, theme: Theme) -> None:
    """Mark a protected token with a bar from ``x`` at height ``y``."""
    axes.plot([x, x + length], [y, y], color=theme.ink, linewidth=1.4, solid_capstyle="butt")
