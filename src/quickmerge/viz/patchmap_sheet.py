"""Write text into images, in the fonts of the other figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.sampling import evenly
from quickmerge.viz.drawing import DARK, LIGHT, Theme, heading_families, rgb
from quickmerge.viz.format import one_line
from quickmerge.viz.patchmap import (
    HUES,
    Alone,
    Fill,
    PatchStage,
    Picture,
    cell_of_pixel,
    clip_of,
    dimmed,
    fill_of,
    image_stage,
    painted,
    pixels_of,
    resized,
)


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
        image: where to write.
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


# Where a photo and its painted copies go on a sheet.


_ROW, _LEAD, _PAIRS = 150.0, 120.0, 100.0
"""The least height of a painted copy, in units, for which each arrangement is taken."""
_TALLEST = 640.0
_CAPTION_WIDTH = 165.0


@dataclass(frozen=True)
class Box:
    """A place for an image, in pixels; its caption goes below."""

    x: int
    y: int
    width: int
    height: int
    room: int
    """The width of the caption."""


@dataclass(frozen=True)
class Space:
    """What an arrangement has to go by, in pixels: the width, the gap between images, a caption's height."""

    width: float
    gap: float
    caption: float
    unit: float
    """Pixels of 1/1200 of the sheet's width."""


def arrange(count: int, aspect: float, space: Space) -> tuple[list[Box], int]:
    """Places for a photo and ``count - 1`` painted copies, all of them of one shape.

    One row, if the copies are high enough to read; else the photo large at left, over two rows of copies; else rows of
    two, else one below the other, for images that are very wide.

    Args:
        count: images, the photo first.
        aspect: width over height of each.
        space: the room there is.

    Returns:
        The places, from the top left of the room; and the height of all in pixels.
    """
    row = _grid(count, count, aspect, space)
    if _height(row) >= _ROW * space.unit:
        return row
    if count > 2:
        lead = _lead(count - 1, aspect, space)
        if _height(lead) >= _LEAD * space.unit:
            return lead
    pairs = _grid(count, min(2, count), aspect, space)
    return pairs if _height(pairs) >= _PAIRS * space.unit else _grid(count, 1, aspect, space)


def _height(places: tuple[list[Box], int]) -> int:
    return min(box.height for box in places[0])


def _grid(count: int, columns: int, aspect: float, space: Space) -> tuple[list[Box], int]:
    cell = (space.width - (columns - 1) * space.gap) / columns
    height = min(cell / aspect, _TALLEST * space.unit)
    width = height * aspect
    if width < cell:  # narrow images move together, as far as their captions let them
        cell = min(cell, max(width, _CAPTION_WIDTH * space.unit))
    left = (space.width - columns * cell - (columns - 1) * space.gap) / 2
    boxes = []
    for index in range(count):
        x = left + index % columns * (cell + space.gap)
        y = index // columns * (height + space.caption)
        boxes.append(_box(x, y, width, height, cell))
    return boxes, round(-(-count // columns) * (height + space.caption))


def _lead(copies: int, aspect: float, space: Space) -> tuple[list[Box], int]:
    columns = -(-copies // 2)
    # The photo is as high as two copies and the caption between them:
    # aspect (2 height + caption) + columns (gap + aspect height) = width
    height = (space.width - aspect * space.caption - columns * space.gap) / (aspect * (2 + columns))
    big = 2 * height + space.caption
    boxes = [_box(0, 0, big * aspect, big, big * aspect)]
    for index in range(copies):
        x = big * aspect + space.gap + index % columns * (aspect * height + space.gap)
        y = index // columns * (height + space.caption)
        boxes.append(_box(x, y, aspect * height, height, aspect * height))
    return boxes, round(2 * (height + space.caption))


def _box(x: float, y: float, width: float, height: float, room: float) -> Box:
    # Ends are rounded, not lengths, so that images under one another end at the same pixel.
    left, top = round(x), round(y)
    right, bottom = max(round(x + width), left + 1), max(round(y + height), top + 1)
    return Box(left, top, right - left, bottom - top, max(round(room), 1))


# What is written around painted images: captions below each, and what the colours mean.


LEADING = 1.45
"""The height of a line, in heights of its font."""


def caption(sheet: Image.Image, box: Box, stage: PatchStage, unit: float, theme: Theme) -> None:
    """Write a stage's name and tokens below its image, under a bar as long as the share of tokens left."""
    _bar(sheet, box, stage.tokens / stage.originally, unit, theme)
    _lines(sheet, box, stage.heading, stage.facts, unit, theme)


def original(sheet: Image.Image, box: Box, facts: str, unit: float, theme: Theme) -> None:
    """Write the caption of the untouched image, under a full bar."""
    _bar(sheet, box, 1.0, unit, theme)
    _lines(sheet, box, "original", facts, unit, theme)


def legend(fills: Sequence[Fill], size: float, room: float, turns: bool = False) -> list[str]:
    """What the colours mean, as far as they occur, in lines that fit.

    Args:
        fills: of all images on the sheet.
        size: height of the font in pixels.
        room: the width of a line in pixels.
        turns: whether all images show what was chosen in turns, which `patchmap_order.key` explains.
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


# Patches in the order in which a method chose them: each framed in the colour of its turn, and numbered.


TURNS: tuple[str, ...] = ("#fff3b0", "#ffc53d", "#f98a0b", "#e8465b", "#b53ea8", "#6c4bd8")
"""From the first choice to the last, ever darker, so that the order is seen without colours too."""
_LEAST, _MOST = 8.0, 13.0
"""The font of the numbers, in pixels: smaller can't be read, and larger hides the patch."""


def turn_colours(ranks: NDArray[np.int64], last: int) -> NDArray[np.float64]:
    """Red, green and blue in 0..255 ``(..., 3)`` of ranks, evenly from 1 to the ``last``."""
    at = (np.clip(ranks, 1, last) - 1) / max(last - 1, 1)
    table = np.array([rgb(colour) for colour in TURNS], dtype=np.float64)
    stops = np.linspace(0, 1, len(TURNS))
    return np.stack([np.interp(at, stops, table[:, channel]) for channel in range(3)], -1)


def last_turn(stages: Sequence[PatchStage]) -> int:
    """How many were chosen in turns, of the stage with the most; 0 where no stage knows of turns."""
    return max((int(stage.ranks.max()) for stage in stages if stage.ranks is not None), default=0)


def ordered(stage: PatchStage, frame: NDArray[np.uint8], size: tuple[int, int], last: int) -> Image.Image:
    """An image with what was kept as in the photo, framed in the colour of its turn, and the rest dimmed.

    Each turn is numbered too, where the number can be read. What was kept without a turn has no frame.

    Args:
        stage: groups and ranks of one image, ``(1, H, W)``.
        frame: ``(height, width, 3)``.
        size: height and width of the result in pixels.
        last: the rank of the last colour.
    """
    assert stage.ranks is not None
    kept, ranks = stage.groups[0] >= 0, stage.ranks[0]
    photo = np.asarray(resized(frame, size), dtype=np.float64)
    y, x = cell_of_pixel(size[0], kept.shape[0])[:, None], cell_of_pixel(size[1], kept.shape[1])
    out = np.where(kept[y, x][..., None], photo, dimmed(photo))
    framed = (ranks > 0)[y, x] & rim(size, kept.shape)
    out = np.where(framed[..., None], turn_colours(ranks, last)[y, x], out)
    picture = Image.fromarray(np.clip(out + 0.5, 0, 255).astype(np.uint8))
    high, wide = size[0] / kept.shape[0], size[1] / kept.shape[1]
    font = number_size((high, wide), last)
    if font:
        for row, column in np.argwhere(ranks > 0).tolist():
            middle = ((column + 0.5) * wide, (row + 0.5) * high)
            centred(picture, middle, str(ranks[row, column]), font)
    return picture


def number_size(patch: tuple[float, float], last: int) -> float:
    """Height in pixels of the font in which ``last`` fits a patch of this height and width; 0 if it can't be read."""
    font = min(0.78 * patch[1] / width_of(str(last), 1.0, bold=True), 0.5 * patch[0], _MOST)
    return font if font >= _LEAST else 0.0


def rim(size: tuple[int, int], grid: tuple[int, ...]) -> NDArray[np.bool_]:
    """The pixels of an image ``size`` that lie along the sides of their patch, ``size`` bool.

    They are a tenth of a patch wide, at least one pixel and at most three.
    """
    patch = min(pixels / cells for pixels, cells in zip(size, grid, strict=True))
    width = min(max(round(0.1 * patch), 1), 3)
    near = []
    for pixels, cells in zip(size, grid, strict=True):
        cell = cell_of_pixel(pixels, cells)
        around = np.pad(cell, width, constant_values=-1)
        near.append((around[:pixels] != cell) | (around[2 * width :] != cell))
    return np.asarray(near[0][:, None] | near[1])


def key(sheet: Image.Image, at: tuple[float, float], last: int, size: float, theme: Theme) -> None:
    """Draw what the colours and numbers mean on one line.

    Args:
        sheet: where to draw.
        at: the left end and the baseline, in pixels.
        last: how many turns there were.
        size: height of the font in pixels.
        theme: the colours of the words.
    """
    x, y = round(at[0]), round(at[1])
    first = "Chosen one after another: 1"
    write(sheet, (x, y), first, size, theme.faint, room=sheet.width)
    x += round(width_of(first, size) + 0.5 * size)
    wide, high = round(12 * size), round(0.75 * size)
    bar = np.broadcast_to(turn_colours(np.arange(1, wide + 1), wide), (high, wide, 3))
    sheet.paste(Image.fromarray((bar + 0.5).astype(np.uint8)), (x, y - high))
    write(sheet, (x + wide + round(0.5 * size), y), f"{last:,}", size, theme.faint, room=sheet.width)


# A photo beside copies that show which of its patches became one token, for a README or a post.


MOST_STAGES = 5
_MARGIN, _GAP, _CAPTION, _TITLE, _SMALL = 28.0, 16.0, 74.0, 54.0, 14.5
"""In units of 1/1200 of the width; the last is the font of the legend."""


def merged_image(
    image: Picture,
    stages: PatchStage | Sequence[PatchStage],
    title: str | None = None,
    *,
    width: int = 1200,
    max_stages: int = 4,
    alone: Alone = "photo",
    dark: bool = False,
) -> Image.Image:
    """Draw the photo and, for some stages, a copy in which every token is outlined and has one colour.

    Below each copy are the stage's name, how many tokens are left, and a bar as long as their share. Where a stage has
    ``ranks``, what was kept looks as in the photo, framed and numbered in the order of the choice.

    Args:
        image: what the model saw, after resizing and cropping.
        stages: the groups at one depth, or at several, rising. Of more than ``max_stages``, as many are drawn at even
            distances, the last among them: of twelve blocks and four copies, blocks 3, 6, 9 and 12.
        title: a heading, if any.
        width: of the image in pixels, at least 300; everything scales with it.
        max_stages: most copies to draw, 1..5.
        alone: what a token of one patch shows: the ``"photo"``, as nothing was merged, or its ``"mean"`` colour.
        dark: draw light on dark.

    Raises:
        QuickmergeError: there are no stages; a stage is not of a single image, or has more patches along a side than
            the image has pixels; the image is neither a Pillow image nor uint8 ``(height, width, 3)``; alone is
            another word.
        ValueError: width or max_stages is no whole number in its range.
    """
    width = whole_number("width", width, 300)
    max_stages = whole_number("max_stages", max_stages)
    if max_stages > MOST_STAGES:
        raise QuickmergeError(f"max_stages must be at most {MOST_STAGES}, got {max_stages}")
    shown = chosen(stages, max_stages)
    pixels = pixels_of(image)
    clip = clip_of([pixels], *map(image_stage, shown))
    theme, unit = DARK if dark else LIGHT, width / 1200
    margin, head = _MARGIN * unit, (_TITLE * unit if title else 0.0)
    space = Space(width - 2 * margin, _GAP * unit, _CAPTION * unit, unit)
    boxes, tall = arrange(1 + len(shown), pixels.shape[1] / pixels.shape[0], space)
    left, top = round(margin), round(margin + head)
    boxes = [replace(box, x=box.x + left, y=box.y + top) for box in boxes]
    fills = [fill_of(clip, stage, alone) for stage in shown]
    last = last_turn(shown)
    lines = legend(fills, _SMALL * unit, space.width, turns=all(stage.ranks is not None for stage in shown))
    if last:
        lines.append("")  # the key is drawn there
    # A caption has room below its last line, which the first line of the legend takes.
    height = round(top + tall + (len(lines) - 1) * LEADING * _SMALL * unit + 8 * unit + margin)
    sheet = Image.new("RGB", (width, height), theme.card)
    if title:
        write(sheet, (left, margin + 22 * unit), title, 25 * unit, theme.ink, room=space.width, bold=True)
    first = boxes[0]
    sheet.paste(resized(pixels, (first.height, first.width)), (first.x, first.y))
    _, rows, columns = shown[0].grid
    original(sheet, first, f"{rows} × {columns} patch{'' if rows * columns == 1 else 'es'}", unit, theme)
    for stage, fill, box in zip(shown, fills, boxes[1:], strict=True):
        size = (box.height, box.width)
        copy = painted(fill, pixels, 0, size) if stage.ranks is None else ordered(stage, pixels, size, last)
        sheet.paste(copy, (box.x, box.y))
        caption(sheet, box, stage, unit, theme)
    foot(sheet, lines, margin, _SMALL * unit, theme)
    if last:
        key(sheet, (left, sheet.height - margin), last, _SMALL * unit, theme)
    return sheet


def chosen(stages: PatchStage | Sequence[PatchStage], most: int) -> list[PatchStage]:
    """At most ``most`` of the stages, at even distances, the last among them; a single stage is a list of one.

    Raises:
        QuickmergeError: there are none, or they are something else.
    """
    if isinstance(stages, PatchStage):
        return [stages]
    if not stages:
        raise QuickmergeError("stages must be at least one PatchStage, got none")
    for stage in stages:
        if not isinstance(stage, PatchStage):
            raise QuickmergeError(f"stages must be PatchStages, got {type(stage).__name__}")
    return evenly(stages, most, at="end")
