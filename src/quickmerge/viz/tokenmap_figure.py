"""Draw one token of the token map image: its fill, its text, and the marks for dropped and protected."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import (
    DARK,
    LIGHT,
    ON_SLOT,
    Theme,
    blend,
    drawable,
    families,
    heading_families,
    new_figure,
    plain_settings,
    save,
    slot_color,
    suffix_of,
    tint_alpha,
    tint_level,
)
from quickmerge.viz.format import clean, one_line, split_lead
from quickmerge.viz.tokenmap import Slots, State, TokenCell, summary

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


# Lay the tokens of a document out in lines of fixed-width cells.


_TAB = "    "
RETURN = "↵"


@dataclass(frozen=True)
class Piece:
    """A stretch of one token on one line."""

    cell: int
    line: int
    column: int
    width: int
    text: str


def width_of(text: str) -> int:
    """Return the columns that ``text`` takes: East Asian wide characters take two, combining marks none."""
    return sum(_columns(char) for char in text)


def lay_out(cells: Sequence[TokenCell], columns: int, lines: int) -> tuple[list[Piece], int]:
    """Return the pieces of the tokens that fit in ``lines`` lines of ``columns``, and how many tokens fit whole.

    Lines break before a word where the word fits on a line of its own, inside it otherwise.
    """
    texts = [clean(cell.text).replace("\t", _TAB).replace("\n", RETURN + "\n") for cell in cells]
    pieces: list[Piece] = []
    line = column = 0
    for index, text in enumerate(texts):
        before = len(pieces)
        if column and _starts_word(text) and column + _word_width(texts, index, columns) > columns:
            line, column = line + 1, 0
            text = text.removeprefix(" ")  # the break stands for the space
        start, begun = 0, column
        for end, char in enumerate(text):
            if char == "\n" or column + _columns(char) > columns:
                pieces.append(Piece(index, line, begun, column - begun, text[start:end]))
                line, column, begun, start = line + 1, 0, 0, end + (char == "\n")
                if char == "\n":
                    continue
            column += _columns(char)
        pieces.append(Piece(index, line, begun, column - begun, text[start:]))
        if pieces[-1].width == 0:
            pieces.pop()
        last = pieces[-1].line if len(pieces) > before else line
        if last >= lines:
            return [piece for piece in pieces[:before] if piece.width], index
    return [piece for piece in pieces if piece.width], len(cells)


def _starts_word(text: str) -> bool:
    return text[:1].isspace() or not text[:1].isalnum()


def _word_width(texts: Sequence[str], index: int, limit: int) -> int:
    """Return the columns of the word whose first token is ``index``, as far as they matter for ``limit``."""
    total = 0
    for offset, text in enumerate(texts[index:]):
        if offset and (text[:1].isspace() or text[:1] == RETURN):
            break
        total += width_of(text.partition("\n")[0])
        if total > limit:
            # Longer than a whole line: breaking before it would only leave a hole.
            return width_of(texts[index].partition("\n")[0])
        if "\n" in text:
            break
    return total


def _columns(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


# The title and the legend of the token map image.


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
    """Return where each entry goes, in as many rows as an image of ``width`` points asks for."""
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


# The token map as an image for a README or a paper.


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
        path: Where to write the image.
        title: The heading of the image.
        columns: Characters on a line (92 where None).
        max_lines: Lines to draw; a longer document is cut and the image says how much it shows.
        dark: Draw light on dark.

    Raises:
        QuickmergeError: there are no tokens, the sizes are too small, or the file cannot be written.
    """
    suffix_of(path)
    wide = _COLUMNS if columns is None else columns
    if wide < 20 or max_lines < 1:
        raise QuickmergeError("A token map image needs at least 20 columns and one line.")
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
