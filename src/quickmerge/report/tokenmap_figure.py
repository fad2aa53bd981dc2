"""The token map as a picture for a README or a paper."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.report.cells import Slots, TokenCell
from quickmerge.report.drawing import new_figure, plain_settings, save, suffix_of
from quickmerge.report.palette import DARK, LIGHT, Theme, slot_color, tint_level
from quickmerge.report.text import split_lead
from quickmerge.report.tokenmap_chips import CELL, LINE, chip, underline, write
from quickmerge.report.tokenmap_head import MARGIN, draw_head, height, legend
from quickmerge.report.tokenmap_layout import Piece, lay_out

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS, _LINES = 92, 36
_FOOT = 26.0


def token_map_figure(
    cells: Sequence[TokenCell],
    path: str | os.PathLike[str],
    *,
    title: str,
    columns: int | None = None,
    max_lines: int = _LINES,
    dark: bool = False,
) -> Path:
    """Draw the document in fixed-width cells, coloured by slot, to ``path`` (.png or .svg by its name).

    Args:
        cells: The tokens of the document in reading order.
        path: Where to write the picture.
        title: The heading of the picture.
        columns: Characters on a line (92 where None).
        max_lines: Lines to draw; a longer document is cut and the picture says how much it shows.
        dark: Draw light on dark.

    Raises:
        QuickmergeError: there are no tokens, the sizes are too small, or the file cannot be written.
    """
    suffix_of(path)
    wide = _COLUMNS if columns is None else columns
    if wide < 20 or max_lines < 1:
        raise QuickmergeError("A token map picture needs at least 20 columns and one line.")
    theme = DARK if dark else LIGHT
    slots = Slots(cells)
    pieces, shown = lay_out(cells, wide, max_lines)
    if not shown:
        raise QuickmergeError(f"The first token alone does not fit in {max_lines} lines of {wide} columns.")
    lines = max((piece.line for piece in pieces), default=0) + 1
    width = 2 * MARGIN + wide * CELL
    with plain_settings(text_as_paths=True):
        entries = legend(slots, width)
        top = height(entries)
        tall = top + lines * LINE + MARGIN + (_FOOT if shown < len(cells) else 0.0)
        figure = new_figure(width / 72, tall / 72)
        figure.set_facecolor(theme.card)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(tall, 0)  # downwards, as text runs
        draw_head(axes, slots, title, entries, theme, width)
        for piece in pieces:
            _draw(axes, slots, cells[piece.cell], piece, top, theme)
        if shown < len(cells):
            words = f"first {shown:,} of {len(cells):,} tokens"
            axes.text(width / 2, tall - 0.9 * MARGIN, words, color=theme.muted, fontsize=9, ha="center", va="center")
        return save(figure, path)


def _draw(axes: Axes, slots: Slots, cell: TokenCell, piece: Piece, top: float, theme: Theme) -> None:
    lead, body = split_lead(piece.text)
    x, y = MARGIN + (piece.column + len(lead)) * CELL, top + (piece.line + 0.5) * LINE
    width = piece.width - len(lead)
    state = slots.state(cell)
    chip(axes, x, y, width, state, slot_color(slots.order.get(cell.slot, 0)), tint_level(cell.weight), theme)
    write(axes, x, y, body, state, theme)
    if cell.protected:
        underline(axes, x + 0.6, y + 0.42 * LINE, width * CELL - 1.2, theme)
