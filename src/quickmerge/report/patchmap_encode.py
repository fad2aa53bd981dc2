"""Encode frames as an animated GIF or WebP."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.report.palette import rgb

_COLOURS, _LOOKED_AT = 256, 8


def encoded(frames: Sequence[Image.Image], kind: str, milliseconds: int, exact: Sequence[str]) -> bytes:
    """Return an endless animation; the same frames give the same bytes.

    Args:
        frames: pictures of one size.
        kind: ``.gif`` or ``.webp``.
        milliseconds: how long each frame stays; GIF rounds it down to tens.
        exact: colours ``#rrggbb``, at most 128, that GIF keeps as they are, for areas of one colour: any other would
            be dithered.
    """
    if kind == ".gif":
        # One table of colours for all frames: with one for each, areas that do not change would flicker.
        table = _table(frames, exact)
        frames = [_reduced(frame, table, exact) for frame in frames]
        options: dict[str, object] = {"optimize": False}
    else:
        options = {"quality": 82, "method": 4}
    stream = io.BytesIO()
    frames[0].save(stream, kind[1:], save_all=True, append_images=frames[1:], duration=milliseconds, loop=0, **options)
    return stream.getvalue()


def _reduced(frame: Image.Image, table: Image.Image, exact: Sequence[str]) -> Image.Image:
    """The frame in the colours of the table."""
    # Pillow looks colours up on a coarse grid, and may take one close to the exact one: put that right.
    index = np.array(frame.quantize(palette=table, dither=Image.Dither.FLOYDSTEINBERG))
    pixels = _number(np.asarray(frame))
    known = _number(np.array([rgb(color) for color in exact]))
    order = np.argsort(known)
    place = order[np.searchsorted(known[order], pixels).clip(max=len(exact) - 1)]
    reduced = Image.fromarray(np.where(known[place] == pixels, place, index).astype(np.uint8))
    reduced.putpalette(table.getpalette() or [])
    return reduced


def _number(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """Each colour ``(..., 3)`` as one number."""
    number: NDArray[np.int64] = pixels.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])
    return number


def _table(frames: Sequence[Image.Image], exact: Sequence[str]) -> Image.Image:
    """A picture whose palette has the exact colours, and those that are nearest to all others of up to eight frames."""
    count = min(_LOOKED_AT, len(frames))
    width, height = frames[0].size
    together = Image.new("RGB", (width, height * count))
    for index in range(count):
        together.paste(frames[index * len(frames) // count], (0, index * height))
    found = together.quantize(_COLOURS - len(exact), method=Image.Quantize.MEDIANCUT).getpalette() or []
    table = Image.new("P", (1, 1))
    table.putpalette([channel for color in exact for channel in rgb(color)] + found)
    return table
