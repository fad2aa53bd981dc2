"""Where a photo and its painted copies go on a sheet."""

from __future__ import annotations

from dataclasses import dataclass

_ROW, _LEAD, _PAIRS = 150.0, 120.0, 100.0
"""The least height of a painted copy, in units, for which each arrangement is taken."""
_TALLEST = 640.0
_CAPTION_WIDTH = 165.0


@dataclass(frozen=True)
class Box:
    """A place for a picture, in pixels; its caption goes below."""

    x: int
    y: int
    width: int
    height: int
    room: int
    """The width of the caption."""


@dataclass(frozen=True)
class Space:
    """What an arrangement has to go by, in pixels: the width, the gap between pictures, a caption's height."""

    width: float
    gap: float
    caption: float
    unit: float
    """Pixels of 1/1200 of the sheet's width."""


def arrange(count: int, aspect: float, space: Space) -> tuple[list[Box], int]:
    """Places for a photo and ``count - 1`` painted copies, all of them of one shape.

    One row, if the copies are high enough to read; else the photo large at left, over two rows of copies; else rows of
    two, else one below the other, for pictures that are very wide.

    Args:
        count: pictures, the photo first.
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
    if width < cell:  # narrow pictures move together, as far as their captions let them
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
    # Ends are rounded, not lengths, so that pictures under one another end at the same pixel.
    left, top = round(x), round(y)
    right, bottom = max(round(x + width), left + 1), max(round(y + height), top + 1)
    return Box(left, top, right - left, bottom - top, max(round(room), 1))
