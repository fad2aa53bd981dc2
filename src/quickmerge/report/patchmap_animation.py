"""A video beside copies painted by tokens, as a moving picture that anyone can open."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.report.files import write_atomically
from quickmerge.report.palette import DARK, LIGHT, Theme
from quickmerge.report.patchmap_captions import LEADING, caption, foot, legend, original
from quickmerge.report.patchmap_encode import encoded
from quickmerge.report.patchmap_files import suffix_among
from quickmerge.report.patchmap_hues import HUES
from quickmerge.report.patchmap_layout import Box
from quickmerge.report.patchmap_paint import Alone, Fill, fill_of, painted, resized
from quickmerge.report.patchmap_picture import MOST_STAGES, chosen
from quickmerge.report.patchmap_stage import PatchStage, Picture, clip_of
from quickmerge.report.patchmap_type import write

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
        frames: F pictures of one size, what the model saw; the T of each stage divides F.
        stages: the groups, one stage or up to five at rising depth; of more, five at even distances.
        path: where to write, ending in .gif or .webp; WebP is several times smaller at better colours.
        seconds_per_frame: how long each frame stays, 0.02..60; GIF rounds it to hundredths.
        title: a heading, if any.
        width: of the picture in pixels, at least 200.
        max_bytes: where the file would be larger, the picture is made narrower until it is not; None for any size.
        alone: what a token of one patch shows: the ``"photo"``, as nothing was merged, or its ``"mean"`` colour.
        dark: draw light on dark.

    Raises:
        QuickmergeError: path ends in something else or cannot be written; there are no frames or stages; frames
            differ in size, or their number is no multiple of T; a grid has more patches along a side than frames have
            pixels; seconds_per_frame or alone is not allowed; max_bytes is too few even for the narrowest picture.
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
    """Every frame as a whole picture of the animation."""
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
