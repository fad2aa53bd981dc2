"""A photo beside copies that show which of its patches became one token, for a README or a post."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from PIL import Image

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.report.palette import DARK, LIGHT
from quickmerge.report.patchmap_captions import LEADING, caption, foot, legend, original
from quickmerge.report.patchmap_layout import Space, arrange
from quickmerge.report.patchmap_order import key, last_turn, ordered
from quickmerge.report.patchmap_paint import Alone, fill_of, image_stage, painted, resized
from quickmerge.report.patchmap_stage import PatchStage, Picture, clip_of, pixels_of
from quickmerge.report.patchmap_type import write

MOST_STAGES = 5
_MARGIN, _GAP, _CAPTION, _TITLE, _SMALL = 28.0, 16.0, 74.0, 54.0, 14.5
"""In units of 1/1200 of the width; the last is the font of the legend."""


def merged_picture(
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
        width: of the picture in pixels, at least 300; everything scales with it.
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
    count = min(most, len(stages))
    return [stages[(index + 1) * len(stages) // count - 1] for index in range(count)]
