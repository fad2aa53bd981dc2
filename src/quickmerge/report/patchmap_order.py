"""Patches in the order in which a method chose them: each framed in the colour of its turn, and numbered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.report.palette import Theme, rgb
from quickmerge.report.patchmap_borders import cell_of_pixel
from quickmerge.report.patchmap_paint import dimmed, resized
from quickmerge.report.patchmap_stage import PatchStage
from quickmerge.report.patchmap_type import centred, width_of, write

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
    """A picture with what was kept as in the photo, framed in the colour of its turn, and the rest dimmed.

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
    """The pixels of a picture ``size`` that lie along the sides of their patch, ``size`` bool.

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
