"""What is written around painted pictures: captions below each, and what the colours mean."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from quickmerge.report.palette import Theme
from quickmerge.report.patchmap_hues import HUES
from quickmerge.report.patchmap_layout import Box
from quickmerge.report.patchmap_paint import Fill
from quickmerge.report.patchmap_stage import PatchStage
from quickmerge.report.patchmap_type import fits, write

LEADING = 1.45
"""The height of a line, in heights of its font."""


def caption(sheet: Image.Image, box: Box, stage: PatchStage, unit: float, theme: Theme) -> None:
    """Write a stage's name and tokens below its picture, under a bar as long as the share of tokens left."""
    _bar(sheet, box, stage.tokens / stage.originally, unit, theme)
    _lines(sheet, box, stage.heading, stage.facts, unit, theme)


def original(sheet: Image.Image, box: Box, facts: str, unit: float, theme: Theme) -> None:
    """Write the caption of the untouched picture, under a full bar."""
    _bar(sheet, box, 1.0, unit, theme)
    _lines(sheet, box, "original", facts, unit, theme)


def legend(fills: Sequence[Fill], size: float, room: float, turns: bool = False) -> list[str]:
    """What the colours mean, as far as they occur, in lines that fit.

    Args:
        fills: of all pictures on the sheet.
        size: height of the font in pixels.
        room: the width of a line in pixels.
        turns: whether all pictures show what was chosen in turns, which `patchmap_order.key` explains.
    """
    if turns:
        words = ["Framed: one token each, kept."]
    else:
        words = _outlines(fills)
    if any((fill.groups < 0).any() for fill in fills):
        words.append("Grey and hatched: dropped.")
    lines: list[str] = []
    for sentence in words:
        if lines and fits(f"{lines[-1]} {sentence}", size, room):
            lines[-1] += f" {sentence}"
        else:
            lines.append(sentence)
    return lines


def _outlines(fills: Sequence[Fill]) -> list[str]:
    most = max(int(fill.spans.sum()) for fill in fills)
    within = any((~fill.spans & ~fill.sharp).any() for fill in fills)
    first = "Each outlined area is one token"
    words = [f"{first}, painted in its mean colour." if within and not most else f"{first}."]
    if most:
        repeat = " (colours repeat, apart)" if most > len(HUES) else ""
        words.append(f"Vivid: it spans frames and keeps its colour{repeat}.")
        words += ["Mean colour: within a frame."] if within else []
    if any(fill.sharp.any() for fill in fills):
        words.append("Sharp: patches on their own.")
    return words


def foot(sheet: Image.Image, lines: Sequence[str], margin: float, size: float, theme: Theme) -> None:
    """Write the lines of the legend along the lower edge, a margin away from it."""
    for index, line in enumerate(lines):
        y = sheet.height - margin - (len(lines) - 1 - index) * LEADING * size
        write(sheet, (round(margin), y), line, size, theme.faint, room=sheet.width - 2 * margin)


def _bar(sheet: Image.Image, box: Box, share: float, unit: float, theme: Theme) -> None:
    top = box.y + box.height + round(8 * unit)
    bottom = top + max(round(5 * unit), 1) - 1
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((box.x, top, box.x + box.width - 1, bottom), fill=theme.soft)
    filled = round(box.width * share)
    if filled:
        draw.rectangle((box.x, top, box.x + filled - 1, bottom), fill=theme.accent)


def _lines(sheet: Image.Image, box: Box, name: str, facts: str, unit: float, theme: Theme) -> None:
    y = box.y + box.height
    write(sheet, (box.x, y + 34 * unit), name, 17.5 * unit, theme.ink, room=box.room, bold=True)
    write(sheet, (box.x, y + 55 * unit), facts, 16 * unit, theme.muted, room=box.room)
