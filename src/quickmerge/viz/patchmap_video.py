"""Encode frames as an animated GIF or WebP."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.sampling import evenly
from quickmerge.viz.drawing import DARK, LIGHT, Theme, rgb, write_atomically
from quickmerge.viz.patchmap import HUES, Alone, Fill, PatchStage, Picture, clip_of, fill_of, painted, resized
from quickmerge.viz.patchmap_sheet import LEADING, MOST_STAGES, Box, caption, chosen, foot, legend, original, write

_COLOURS, _LOOKED_AT = 256, 8


def encoded(frames: Sequence[Image.Image], kind: str, milliseconds: int, exact: Sequence[str]) -> bytes:
    """Return an endless animation; the same frames give the same bytes.

    Args:
        frames: images of one size.
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
    """An image whose palette has the exact colours, and those that are nearest to all others of up to eight frames."""
    count = min(_LOOKED_AT, len(frames))
    width, height = frames[0].size
    together = Image.new("RGB", (width, height * count))
    for index in range(count):
        together.paste(frames[index * len(frames) // count], (0, index * height))
    found = together.quantize(_COLOURS - len(exact), method=Image.Quantize.MEDIANCUT).getpalette() or []
    table = Image.new("P", (1, 1))
    table.putpalette([channel for color in exact for channel in rgb(color)] + found)
    return table


# Write images whole or not at all.


_FORMATS: dict[str, dict[str, object]] = {".png": {"optimize": True}, ".webp": {"quality": 90, "method": 6}}


def write_image(picture: Image.Image, path: str | os.PathLike[str]) -> Path:
    """Write an image as PNG, or as WebP at a fraction of the size, by the ending of its name.

    Raises:
        QuickmergeError: path ends in neither .png nor .webp, or cannot be written.
    """
    kind = suffix_among(path, tuple(_FORMATS))
    stream = io.BytesIO()
    picture.save(stream, kind[1:], **_FORMATS[kind])
    return write_atomically(path, stream.getvalue())


def suffix_among(path: str | os.PathLike[str], allowed: tuple[str, ...]) -> str:
    """The ending of a name in lower case, such as ``.png``; QuickmergeError unless it is allowed."""
    kind = Path(path).suffix.lower()
    if kind not in allowed:
        raise QuickmergeError(f"path must end in {' or '.join(allowed)}, got {os.fspath(path)!r}")
    return kind


# Frames of a video side by side, with the tokens that reach over several of them in the same colour in each.


MOST_FRAMES = 8
_STRIP_MARGIN, _STRIP_GAP = 28.0, 8.0
_STRIP_TITLE, _FACTS, _FRAME, _STRIP_SMALL = 36.0, 34.0, 52.0, 14.5


def video_strip(
    frames: Sequence[Picture] | NDArray[np.uint8],
    stage: PatchStage,
    title: str | None = None,
    *,
    width: int = 1600,
    max_frames: int = MOST_FRAMES,
    alone: Alone = "photo",
    dark: bool = False,
) -> Image.Image:
    """Draw frames in a row, painted by tokens, and the untouched frames below.

    A token over several steps in time has one bright colour in all of its frames, and another than the tokens around
    it; a token within one step has the mean colour of its pixels.

    Args:
        frames: F images of one size, what the model saw; the grid's T divides F.
        stage: the groups ``(T, H, W)``.
        title: a heading, if any.
        width: of the image in pixels, at least 300; everything scales with it. One or two frames take less.
        max_frames: most frames to draw, 1..8, at even distances.
        alone: what a token of one patch shows: the ``"photo"``, as nothing was merged, or its ``"mean"`` colour.
        dark: draw light on dark.

    Raises:
        QuickmergeError: there are no frames, they differ in size, or their number is no multiple of T; a grid has
            more patches along a side than frames have pixels; alone is another word.
        ValueError: width or max_frames is no whole number in its range.
    """
    width = whole_number("width", width, 300)
    max_frames = whole_number("max_frames", max_frames)
    if max_frames > MOST_FRAMES:
        raise QuickmergeError(f"max_frames must be at most {MOST_FRAMES}, got {max_frames}")
    (shown,) = chosen([stage], 1)  # refuses what is none
    clip = clip_of(frames, shown)
    fill = fill_of(clip, shown, alone)
    theme, unit = DARK if dark else LIGHT, width / 1200
    margin, gap = round(_STRIP_MARGIN * unit), round(_STRIP_GAP * unit)
    picked = evenly(range(len(clip)), max_frames, at="middle")
    room = width - 2 * margin
    wide = min((room - (len(picked) - 1) * gap) // len(picked), room // 3)  # few frames do not fill the sheet
    tall = max(round(wide * clip.shape[1] / clip.shape[2]), 1)
    room = max(len(picked) * wide + (len(picked) - 1) * gap, round(560 * unit))
    top = margin + round((_STRIP_TITLE * unit if title else 0) + _FACTS * unit)
    below = top + tall + gap
    lines = legend([fill], _STRIP_SMALL * unit, room)
    height = round(below + tall + (_FRAME + (len(lines) - 1) * LEADING * _STRIP_SMALL) * unit + margin)
    sheet = Image.new("RGB", (room + 2 * margin, height), theme.card)
    y: float = margin
    if title:
        write(sheet, (margin, y + 20 * unit), title, 25 * unit, theme.ink, room=room, bold=True)
        y += _STRIP_TITLE * unit
    write(sheet, (margin, y + 14 * unit), facts(shown, fill), 17 * unit, theme.muted, room=room)
    for column, frame in enumerate(picked):
        x = margin + column * (wide + gap)
        step = frame * shown.grid[0] // len(clip)
        sheet.paste(painted(fill, clip[frame], step, (tall, wide)), (x, top))
        sheet.paste(resized(clip[frame], (tall, wide)), (x, below))
        at = (x, below + tall + 20 * unit)
        write(sheet, at, f"frame {frame + 1}", 15 * unit, theme.muted, room=wide)
    foot(sheet, lines, margin, _STRIP_SMALL * unit, theme)
    return sheet


def facts(stage: PatchStage, fill: Fill) -> str:
    """The stage in words: its name, how many tokens, and how many of them reach over time."""
    across = int(fill.spans.sum())
    parts = [f"{stage.heading}: {stage.facts}"]
    parts += [f"{across:,} merged across time"] if stage.grid[0] > 1 else []
    return " · ".join(parts)


# A video beside copies painted by tokens, as a moving image that anyone can open.


_NARROWEST = 200
_CAPTION_SCALE = 0.85
_MARGIN, _GAP, _TITLE, _CAPTION, _SMALL = 16.0, 10.0, 36.0, 74.0, 12.0


def video_animation(
    frames: Sequence[Picture] | NDArray[np.uint8],
    stages: PatchStage | Sequence[PatchStage],
    path: str | os.PathLike[str],
    seconds_per_frame: float = 0.12,
    *,
    title: str | None = None,
    width: int = 720,
    max_bytes: int | None = 4_000_000,
    alone: Alone = "photo",
    dark: bool = False,
) -> Path:
    """Write an endless animation, the frames at left and painted copies beside them, one for each stage.

    Colours are those of `video_strip`. The file appears whole or not at all.

    Args:
        frames: F images of one size, what the model saw; the T of each stage divides F.
        stages: the groups, one stage or up to five at rising depth; of more, five at even distances.
        path: where to write, ending in .gif or .webp; WebP is several times smaller at better colours.
        seconds_per_frame: how long each frame stays, 0.02..60; GIF rounds it to hundredths.
        title: a heading, if any.
        width: of the image in pixels, at least 200.
        max_bytes: where the file would be larger, the image is made narrower until it is not; None for any size.
        alone: what a token of one patch shows: the ``"photo"``, as nothing was merged, or its ``"mean"`` colour.
        dark: draw light on dark.

    Raises:
        QuickmergeError: path ends in something else or cannot be written; there are no frames or stages; frames
            differ in size, or their number is no multiple of T; a grid has more patches along a side than frames have
            pixels; seconds_per_frame or alone is not allowed; max_bytes is too few even for the narrowest image.
        ValueError: width or max_bytes is no whole number in its range.
    """
    kind = suffix_among(path, (".gif", ".webp"))
    if not (isinstance(seconds_per_frame, (int, float)) and 0.02 <= seconds_per_frame <= 60):
        raise QuickmergeError(f"seconds_per_frame must be within 0.02..60, got {seconds_per_frame!r}")
    width = whole_number("width", width, _NARROWEST)
    if max_bytes is not None:
        max_bytes = whole_number("max_bytes", max_bytes)
    shown = chosen(stages, MOST_STAGES)
    clip = clip_of(frames, *shown)
    fills = [fill_of(clip, stage, alone) for stage in shown]
    theme = DARK if dark else LIGHT
    exact = [theme.card, theme.ink, theme.muted, theme.faint, theme.accent, theme.soft, "#ffffff", *HUES]
    while True:
        sheets = _sheets(clip, shown, fills, title, width, theme)
        content = encoded(sheets, kind, round(1000 * seconds_per_frame), exact)
        if max_bytes is None or len(content) <= max_bytes:
            return write_atomically(path, content)
        if width <= _NARROWEST:
            raise QuickmergeError(
                f"max_bytes must be at least {len(content):,} for {len(clip)} frames as {kind}, got {max_bytes:,}: "
                f"give fewer frames{' or write .webp' if kind == '.gif' else ''}"
            )
        # Bytes grow about as pixels do; a little less, so that the next try mostly fits.
        width = max(_NARROWEST, int(width * min(0.9, 0.96 * math.sqrt(max_bytes / len(content)))))


def _sheets(
    clip: NDArray[np.uint8],
    stages: Sequence[PatchStage],
    fills: Sequence[Fill],
    title: str | None,
    width: int,
    theme: Theme,
) -> list[Image.Image]:
    """Every frame as a whole image of the animation."""
    unit = width / 720
    margin, gap = round(_MARGIN * unit), round(_GAP * unit)
    panels = 1 + len(stages)
    room = width - 2 * margin
    wide = max((room - (panels - 1) * gap) // panels, 1)
    tall = max(round(wide * clip.shape[1] / clip.shape[2]), 1)
    top = margin + round(_TITLE * unit if title else 0)
    lines = legend(fills, _SMALL * unit, room)
    height = round(top + tall + (_CAPTION + (len(lines) - 1) * LEADING * _SMALL) * unit + margin)
    still = Image.new("RGB", (width, height), theme.card)
    if title:
        write(still, (margin, margin + 17 * unit), title, 20 * unit, theme.ink, room=room, bold=True)
    boxes = [Box(margin + index * (wide + gap), top, wide, tall, wide) for index in range(panels)]
    original(still, boxes[0], f"{len(clip):,} frame{'' if len(clip) == 1 else 's'}", _CAPTION_SCALE * unit, theme)
    for stage, box in zip(stages, boxes[1:], strict=True):
        caption(still, box, stage, _CAPTION_SCALE * unit, theme)
    foot(still, lines, margin, _SMALL * unit, theme)
    sheets = []
    for index, frame in enumerate(clip):
        sheet = still.copy()
        sheet.paste(resized(frame, (tall, wide)), (boxes[0].x, top))
        for fill, box in zip(fills, boxes[1:], strict=True):
            step = index * len(fill.groups) // len(clip)
            sheet.paste(painted(fill, frame, step, (tall, wide)), (box.x, top))
        sheets.append(sheet)
    return sheets
