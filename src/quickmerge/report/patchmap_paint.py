"""Paint a picture by which patches are one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.errors import QuickmergeError
from quickmerge.report.palette import rgb
from quickmerge.report.patchmap_borders import border_coverage, cell_of_pixel
from quickmerge.report.patchmap_hues import HUES, hues, spanning
from quickmerge.report.patchmap_stage import PatchStage, Picture, clip_of, pixels_of

Alone: TypeAlias = Literal["mean", "photo"]
"""How a group of one patch is shown: in its mean colour as all others, or as the photo, since nothing was merged."""

_LUMA = np.array([0.2126, 0.7152, 0.0722])


@dataclass(frozen=True)
class Fill:
    """What each group is painted with.

    ``groups (T, H, W)``: 0..G-1, or -1 for dropped. ``colours (G, 3)``: red, green, blue in 0..255.
    ``sharp (G,)`` bool: the groups that show the photo instead. ``spans (G,)`` bool: those over several steps in time.
    """

    groups: NDArray[np.int64]
    colours: NDArray[np.float64]
    sharp: NDArray[np.bool_]
    spans: NDArray[np.bool_]


def group_colours(image: Picture, groups: NDArray[np.int64], *, alone: Alone = "mean") -> Image.Image:
    """Paint each group of patches in the mean colour of its pixels, with white lines around groups.

    Dropped patches become dark, grey and hatched. Lines get a dark casing where they cross light colours.

    Args:
        image: what the model saw, after resizing and cropping.
        groups: ``(1, H, W)`` whole numbers: the slot of each patch, -1 where it was dropped.
        alone: what a group of one patch shows, its ``"mean"`` colour or the ``"photo"``.

    Returns:
        A picture of the same size.

    Raises:
        QuickmergeError: groups are no such array or have more patches along a side than the image has pixels; the
            image is neither a Pillow image nor uint8 ``(height, width, 3)``; alone is another word.
    """
    pixels, stage = pixels_of(image), image_stage(PatchStage("groups", groups))
    return painted(fill_of(clip_of([pixels], stage), stage, alone), pixels, 0, pixels.shape[:2])


def image_stage(stage: PatchStage) -> PatchStage:
    """The stage itself; QuickmergeError where it is not of a single image."""
    if stage.grid[0] != 1:
        raise QuickmergeError(f"groups of an image must be (1, H, W), got {stage.grid} of {stage.heading!r}")
    return stage


def fill_of(clip: NDArray[np.uint8], stage: PatchStage, alone: Alone) -> Fill:
    """Choose what to paint each group with.

    Args:
        clip: ``(F, height, width, 3)``, as `clip_of` checked it against the stage.
        stage: the groups. One over several steps in time gets a hue of its own, the others their mean colour over
            all of their pixels.
        alone: what a group of one patch shows.

    Raises:
        QuickmergeError: alone is neither word.
    """
    if alone not in get_args(Alone):
        raise QuickmergeError(f"alone must be 'mean' or 'photo', got {alone!r}")
    groups, count = stage.dense()
    spans = spanning(groups, count)
    chosen = hues(groups, count, spans)
    table = np.array([rgb(hue) for hue in HUES], dtype=np.float64)
    colours = np.where(spans[:, None], table[chosen], mean_colours(clip, groups, count))
    sizes = np.bincount(groups[groups >= 0], minlength=count)
    return Fill(groups, colours, (sizes == 1) & (alone == "photo"), spans)


def mean_colours(clip: NDArray[np.uint8], groups: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """The mean of each group's pixels over all frames ``(count, 3)``.

    Args:
        clip: ``(F, height, width, 3)``.
        groups: ``(T, H, W)``, 0..count-1 or -1 for dropped; F is a multiple of T.
        count: how many groups there are.
    """
    steps, rows, columns = groups.shape
    y, x = cell_of_pixel(clip.shape[1], rows), cell_of_pixel(clip.shape[2], columns)
    total, pixels = np.zeros((count, 3)), np.zeros(count)
    for index, frame in enumerate(clip):
        label = groups[index * steps // len(clip)][y[:, None], x]
        inside = label[label >= 0]
        pixels += np.bincount(inside, minlength=count)
        for channel in range(3):
            total[:, channel] += np.bincount(inside, frame[..., channel][label >= 0], minlength=count)
    return total / pixels[:, None]


def painted(fill: Fill, frame: NDArray[np.uint8], step: int, size: tuple[int, int]) -> Image.Image:
    """One frame, painted.

    Args:
        fill: what each group gets.
        frame: ``(height, width, 3)``, seen where patches are alone or dropped.
        step: the frame's step in time, 0..T-1.
        size: height and width of the result in pixels.
    """
    groups = fill.groups[step]
    photo = np.asarray(resized(frame, size), dtype=np.float64)
    label = groups[cell_of_pixel(size[0], groups.shape[0])[:, None], cell_of_pixel(size[1], groups.shape[1])]
    out = dimmed(photo)
    if len(fill.colours):
        known = np.where(label >= 0, label, 0)
        full = np.where(fill.sharp[known][..., None], photo, fill.colours[known])
        out = np.where((label >= 0)[..., None], full, out)
    return Image.fromarray(np.clip(_outlined(out, groups) + 0.5, 0, 255).astype(np.uint8))


def resized(frame: NDArray[np.uint8], size: tuple[int, int]) -> Image.Image:
    """The frame scaled to ``size``, height and width in pixels."""
    photo = Image.fromarray(frame)
    if size == frame.shape[:2]:
        return photo
    # Pixels that grow much are shown as what they are; smoothing would invent ripples.
    much = min(size[0] / frame.shape[0], size[1] / frame.shape[1]) >= 4
    return photo.resize((size[1], size[0]), Image.Resampling.NEAREST if much else Image.Resampling.LANCZOS)


def dimmed(photo: NDArray[np.float64]) -> NDArray[np.float64]:
    """Dark, grey and hatched: what the model no longer reads. The hatching tells it from a dark or grey picture."""
    grey = 18 + 0.32 * (photo @ _LUMA)
    y, x = np.indices(grey.shape)
    off = np.abs((x + y) % 9 - 4)  # pixels from the middle of the nearest diagonal, along a row
    return np.repeat((grey + 30 * np.clip(1.5 - off, 0, 1))[..., None], 3, -1)


def _outlined(out: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    size = out.shape[:2]
    cell = min(size[0] / groups.shape[0], size[1] / groups.shape[1])
    width = float(np.clip(0.08 * cell, 0.6, 2.0))
    # White is lost on light colours, so lines are cased in a shadow there, more the lighter it is.
    light = np.clip((out @ _LUMA / 255 - 0.5) / 0.3, 0, 1)
    strength = float(np.clip(cell / 12, 0.5, 1.0))  # in a fine grid lines must leave something to see
    casing = 0.45 * strength * light * border_coverage(groups, size, 2.6 * width)
    line = 0.9 * strength * border_coverage(groups, size, width)
    out = out * (1 - casing[..., None])
    return out * (1 - line[..., None]) + 255 * line[..., None]
