"""Write text into pictures, in the fonts of the other figures."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from quickmerge.report.fonts import heading_families
from quickmerge.report.text import one_line


def write(
    picture: Image.Image,
    at: tuple[float, float],
    words: str,
    size: float,
    color: str,
    *,
    room: float,
    bold: bool = False,
) -> None:
    """Write one line.

    Args:
        picture: where to write.
        at: the left end and the baseline, in pixels.
        words: what to write; cut with an ellipsis where it is wider than ``room``.
        size: height of the font in pixels.
        color: ``#rrggbb``.
        room: the most width to take, in pixels.
        bold: whether to write in bold.
    """
    words = one_line(words, 300)
    font = _font(_file(words, bold), size)
    if font.getlength(words) > room:
        while len(words) > 1 and font.getlength(words + "…") > room:
            words = words[:-1].rstrip()
        words += "…"
    ImageDraw.Draw(picture).text(at, words, fill=color, font=font, anchor="ls")


def fits(words: str, size: float, room: float) -> bool:
    """Whether a line of this font height is at most ``room`` pixels wide."""
    return width_of(words, size) <= room


def width_of(words: str, size: float, *, bold: bool = False) -> float:
    """How wide a line of this font height is, in pixels."""
    return _font(_file(words, bold), size).getlength(words)


def centred(picture: Image.Image, at: tuple[float, float], words: str, size: float) -> None:
    """Write a few words in bold around the point ``at``, white in a black casing: to be read on any photo."""
    font = _font(_file(words, bold=True), size)
    ImageDraw.Draw(picture).text(
        at, words, fill="#ffffff", font=font, anchor="mm", stroke_width=max(1, round(size / 8)), stroke_fill="#000000"
    )


@cache
def _font(file: str, size: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size)


def _file(words: str, bold: bool) -> str:
    """The font that draws all of ``words``: the one that comes with matplotlib, or the first installed that can."""
    import matplotlib

    default = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf")
    needed = {ord(char) for char in words if not char.isspace()}
    if needed <= _characters(str(default)):
        return str(default)
    from matplotlib.font_manager import FontProperties, findfont

    for family in heading_families():
        file = str(findfont(FontProperties(family=family, weight="bold" if bold else "normal")))
        if needed <= _characters(file):
            return file
    return str(default)  # it draws a box for what it lacks


@cache
def _characters(file: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(file).get_charmap())
