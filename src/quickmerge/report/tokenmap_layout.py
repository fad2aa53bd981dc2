"""Lay the tokens of a document out in lines of fixed-width cells."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from quickmerge.report.cells import TokenCell
from quickmerge.report.text import clean

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
