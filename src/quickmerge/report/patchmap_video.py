"""Frames of a video side by side, with the tokens that reach over several of them in the same colour in each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.report.palette import DARK, LIGHT
from quickmerge.report.patchmap_captions import LEADING, foot, legend
from quickmerge.report.patchmap_paint import Alone, Fill, fill_of, painted, resized
from quickmerge.report.patchmap_picture import chosen
from quickmerge.report.patchmap_stage import PatchStage, Picture, clip_of
from quickmerge.report.patchmap_type import write

MOST_FRAMES = 8
_MARGIN, _GAP = 28.0, 8.0
_TITLE, _FACTS, _FRAME, _SMALL = 36.0, 34.0, 52.0, 14.5


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
        frames: F pictures of one size, what the model saw; the grid's T divides F.
        stage: the groups ``(T, H, W)``.
        title: a heading, if any.
        width: of the picture in pixels, at least 300; everything scales with it. One or two frames take less.
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
    margin, gap = round(_MARGIN * unit), round(_GAP * unit)
    picked = spread(len(clip), max_frames)
    room = width - 2 * margin
    wide = min((room - (len(picked) - 1) * gap) // len(picked), room // 3)  # few frames do not fill the sheet
    tall = max(round(wide * clip.shape[1] / clip.shape[2]), 1)
    room = max(len(picked) * wide + (len(picked) - 1) * gap, round(560 * unit))
    top = margin + round((_TITLE * unit if title else 0) + _FACTS * unit)
    below = top + tall + gap
    lines = legend([fill], _SMALL * unit, room)
    height = round(below + tall + (_FRAME + (len(lines) - 1) * LEADING * _SMALL) * unit + margin)
    sheet = Image.new("RGB", (room + 2 * margin, height), theme.card)
    y: float = margin
    if title:
        write(sheet, (margin, y + 20 * unit), title, 25 * unit, theme.ink, room=room, bold=True)
        y += _TITLE * unit
    write(sheet, (margin, y + 14 * unit), facts(shown, fill), 17 * unit, theme.muted, room=room)
    for column, frame in enumerate(picked):
        x = margin + column * (wide + gap)
        step = frame * shown.grid[0] // len(clip)
        sheet.paste(painted(fill, clip[frame], step, (tall, wide)), (x, top))
        sheet.paste(resized(clip[frame], (tall, wide)), (x, below))
        at = (x, below + tall + 20 * unit)
        write(sheet, at, f"frame {frame + 1}", 15 * unit, theme.muted, room=wide)
    foot(sheet, lines, margin, _SMALL * unit, theme)
    return sheet


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``count`` indices, rising, at even distances and as far from both ends."""
    wanted = min(count, most)
    return [(2 * index + 1) * count // (2 * wanted) for index in range(wanted)]


def facts(stage: PatchStage, fill: Fill) -> str:
    """The stage in words: its name, how many tokens, and how many of them reach over time."""
    across = int(fill.spans.sum())
    parts = [f"{stage.heading}: {stage.facts}"]
    parts += [f"{across:,} merged across time"] if stage.grid[0] > 1 else []
    return " · ".join(parts)
