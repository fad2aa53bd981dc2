"""Which patches of an image or a video are one token, after some depth of a model; and the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.images import as_rgb
from quickmerge.viz.drawing import rgb
from quickmerge.viz.format import one_line

Picture: TypeAlias = Image.Image | NDArray[np.uint8]
"""A Pillow image, or its pixels ``(height, width, 3)`` in 0..255."""


@dataclass(frozen=True, eq=False)
class PatchStage:
    """Where each original patch is at one depth of the model.

    Args:
        name: what captions call it, such as ``"block 6"``.
        groups: ``(T, H, W)`` whole numbers: the slot each original patch is in, -1 where it was dropped. T is 1 for
            an image. Slots need not be numbered without gaps.
        unplaced: tokens that stand for no place, such as the class token; they count in captions only.
        ranks: ``(T, H, W)`` whole numbers, where slots were chosen one after another: 1 for patches of the first one,
            2 of the second, and so on; 0 where that can't be said. None for methods that choose otherwise.

    Raises:
        QuickmergeError: groups or ranks are no such array, or unplaced is negative.
    """

    name: str
    groups: NDArray[np.int64]
    unplaced: int = 0
    ranks: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        groups: NDArray[Any] = np.asarray(self.groups)
        if groups.ndim != 3 or 0 in groups.shape:
            raise QuickmergeError(f"groups must be a slot for each patch, (T, H, W), got shape {groups.shape}")
        if not np.issubdtype(groups.dtype, np.integer):
            raise QuickmergeError(f"groups must be whole numbers, got {groups.dtype}")
        if int(groups.min()) < -1:
            raise QuickmergeError(f"groups must be slots of at least 0, or -1 for dropped, got {int(groups.min())}")
        object.__setattr__(self, "unplaced", whole_number("unplaced", self.unplaced, 0))
        self._keep("groups", groups)
        if self.ranks is None:
            return
        ranks: NDArray[Any] = np.asarray(self.ranks)
        if ranks.shape != groups.shape or not np.issubdtype(ranks.dtype, np.integer):
            raise QuickmergeError(
                f"ranks must be a whole number for each patch, {groups.shape}, got {ranks.dtype} {ranks.shape}"
            )
        if (ranks < 0).any() or ranks[groups < 0].any():
            raise QuickmergeError("ranks must be at least 0, and 0 where a patch was dropped")
        self._keep("ranks", ranks)

    def _keep(self, name: str, given: NDArray[Any]) -> None:
        kept = given.astype(np.int64)  # a copy: what is shown later is what was given now
        kept.flags.writeable = False
        object.__setattr__(self, name, kept)

    @property
    def grid(self) -> tuple[int, int, int]:
        """Patches along each axis, (T, H, W)."""
        t, h, w = self.groups.shape
        return t, h, w

    @property
    def tokens(self) -> int:
        """How many tokens the model reads on with."""
        return int(np.unique(self.groups[self.groups >= 0]).size) + self.unplaced

    @property
    def originally(self) -> int:
        """How many tokens there were at first."""
        return int(self.groups.size) + self.unplaced

    @property
    def heading(self) -> str:
        """The name, on one line."""
        return one_line(self.name, 60)

    @property
    def facts(self) -> str:
        """How many tokens are left, such as ``120 of 257 tokens``."""
        return f"{self.tokens:,} of {self.originally:,} token{'' if self.originally == 1 else 's'}"

    def dense(self) -> tuple[NDArray[np.int64], int]:
        """Groups numbered 0..G-1 in order of their slots, -1 for dropped ``(T, H, W)``; and G."""
        slots = np.unique(self.groups[self.groups >= 0])
        if not slots.size:
            return np.full(self.groups.shape, -1, dtype=np.int64), 0
        return np.where(self.groups >= 0, np.searchsorted(slots, self.groups), -1), int(slots.size)


def pixels_of(picture: Picture, name: str = "image") -> NDArray[np.uint8]:
    """The pixels ``(height, width, 3)`` in 0..255; what is transparent is white, as models see it.

    Raises:
        QuickmergeError: neither a Pillow image nor such an array; ``name`` is what it was given for.
    """
    if isinstance(picture, Image.Image):
        picture = np.asarray(as_rgb(picture))
    if not isinstance(picture, np.ndarray):
        raise QuickmergeError(f"{name} must be a Pillow image or an array, got {type(picture).__name__}")
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise QuickmergeError(
            f"{name} must be a Pillow image or a uint8 array (height, width, 3), got {picture.dtype} {picture.shape}"
        )
    return picture


def clip_of(frames: Sequence[Picture] | NDArray[np.uint8], *stages: PatchStage) -> NDArray[np.uint8]:
    """The pixels of all frames ``(F, height, width, 3)``.

    Raises:
        QuickmergeError: there are no frames or they differ in size; a stage's grid has no T that F is a multiple of
            (a patch covers F / T frames), or more patches along a side than there are pixels.
    """
    pictures = [pixels_of(frame, f"frames[{index}]") for index, frame in enumerate(frames)]
    if not pictures:
        raise QuickmergeError("frames must be at least one image, got none")
    for index, picture in enumerate(pictures):
        if picture.shape != pictures[0].shape:
            raise QuickmergeError(
                f"frames must all be of the size of the first, {_size(pictures[0])}, got {_size(picture)} at {index}"
            )
    for stage in stages:
        t, h, w = stage.grid
        if len(pictures) % t:
            raise QuickmergeError(
                f"frames must be a multiple of the {t} steps in time of groups {stage.grid}, got {len(pictures)}"
            )
        if h > pictures[0].shape[0] or w > pictures[0].shape[1]:
            raise QuickmergeError(
                f"groups must have at most a patch a pixel, {_size(pictures[0])}, got {h} x {w} of {stage.heading!r}"
            )
    return np.stack(pictures)


def _size(picture: NDArray[np.uint8]) -> str:
    return f"{picture.shape[0]} x {picture.shape[1]}"


# Colours for groups that reach over several frames: the same in every frame, and never the neighbour's.


# Chosen to be as far apart as twelve colours can be (0.09 in OKLab) for readers with full colour vision and with
# deuteranopia, protanopia and tritanopia alike; the first few also look well together.
HUES: tuple[str, ...] = (
    *("#4c9deb", "#e1b942", "#dc7095", "#751e5f", "#82eafc", "#78792b"),
    *("#4055ac", "#c2e59f", "#934f71", "#a4bbff", "#ad9907", "#35520b"),
)


def spanning(groups: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Which groups have members at several steps in time ``(count,)``.

    Args:
        groups: ``(T, H, W)``, 0..count-1 or -1 for dropped.
        count: how many groups there are.
    """
    steps = np.zeros((count, len(groups)), dtype=bool)
    t, y, x = np.nonzero(groups >= 0)
    steps[groups[t, y, x], t] = True
    return np.asarray(steps.sum(1) > 1)


def hues(groups: NDArray[np.int64], count: int, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Which of `HUES` each wanted group gets ``(count,)``, -1 for the others.

    The largest group chooses first. Each takes the colour that fewest have, of those that no group beside it has:
    beside it in the image, corners too, or in its place at the next step, where a change of colour shows that the
    token ended. Up to twelve groups all differ; where all twelve colours are around, the rarest there is taken.

    Args:
        groups: ``(T, H, W)``, 0..count-1 or -1 for dropped.
        count: how many groups there are.
        wanted: ``(count,)``, the groups to colour.
    """
    sizes = np.bincount(groups[groups >= 0], minlength=count)
    beside: list[list[int]] = [[] for _ in range(count)]
    for one, other in _touching(groups).tolist():
        beside[one].append(other)
        beside[other].append(one)
    chosen = np.full(count, -1, dtype=np.int64)
    used = np.zeros(len(HUES), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable").tolist():
        if wanted[group]:
            around = chosen[beside[group]]
            taken = np.bincount(around[around >= 0], minlength=len(HUES))
            chosen[group] = np.lexsort((used, taken))[0]
            used[chosen[group]] += 1
    return chosen


def _touching(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pairs ``(P, 2)`` of different groups that touch, each once."""
    across = [
        (groups[:, :, 1:], groups[:, :, :-1]),
        (groups[:, 1:], groups[:, :-1]),
        (groups[:, 1:, 1:], groups[:, :-1, :-1]),
        (groups[:, 1:, :-1], groups[:, :-1, 1:]),
        (groups[1:], groups[:-1]),
    ]
    pairs = np.concatenate([np.stack([one.ravel(), other.ravel()], -1) for one, other in across])
    pairs = np.sort(pairs[(pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])], axis=1)
    return np.unique(pairs, axis=0)


# The lines between groups of patches, exactly anti-aliased.


def cell_of_pixel(pixels: int, cells: int) -> NDArray[np.int64]:
    """The cell that the middle of each pixel lies in ``(pixels,)``, where as many cells share the length evenly."""
    cell: NDArray[np.int64] = (2 * np.arange(pixels, dtype=np.int64) + 1) * cells // (2 * pixels)
    return cell


def border_coverage(groups: NDArray[np.int64], size: tuple[int, int], width: float) -> NDArray[np.float64]:
    """How much of each pixel the border lines cover, 0..1.

    A line runs along every side that two patches of different groups share, ``width`` wide and around the side's
    middle. It has square ends, so that lines meet. All lines are along the axes: a pixel's share in one is the
    product of two overlaps of intervals, and the share in all lines of one direction is a product of matrices. Of
    the two directions the larger share counts.

    Args:
        groups: ``(H, W)``, the group of each patch.
        size: height and width of the image in pixels.
        width: of the lines in pixels.

    Returns:
        ``(height, width)``.
    """
    upright = (groups[:, 1:] != groups[:, :-1]).astype(np.float64)  # (H, W-1): a line right of the patch
    level = (groups[1:] != groups[:-1]).astype(np.float64)  # (H-1, W): a line below the patch
    (rows, columns), (h, w) = groups.shape, size
    along_y, across_y = _ends(h, rows, width), _sides(h, rows, width)
    along_x, across_x = _ends(w, columns, width), _sides(w, columns, width)
    # Lines that go on overlap by their ends, and must not count twice there: it would show as a dot.
    down = np.minimum(along_y @ upright, 1.0) @ across_x.T
    right = across_y @ np.minimum(level @ along_x.T, 1.0)
    covered: NDArray[np.float64] = np.minimum(np.maximum(down, right), 1.0)
    return covered


def _sides(pixels: int, cells: int, width: float) -> NDArray[np.float64]:
    """Overlap ``(pixels, cells - 1)`` of each pixel with a line across each inner side."""
    middle = np.arange(1, cells, dtype=np.float64) * (pixels / cells)
    return _overlap(pixels, middle - width / 2, middle + width / 2)


def _ends(pixels: int, cells: int, width: float) -> NDArray[np.float64]:
    """Overlap ``(pixels, cells)`` of each pixel with a line along each cell."""
    start = np.arange(cells, dtype=np.float64) * (pixels / cells)
    return _overlap(pixels, start - width / 2, start + pixels / cells + width / 2)


def _overlap(pixels: int, start: NDArray[np.floating[Any]], end: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    left = np.arange(pixels, dtype=np.float64)[:, None]
    overlap: NDArray[np.float64] = np.clip(np.minimum(left + 1, end) - np.maximum(left, start), 0.0, 1.0)
    return overlap


# Paint an image by which patches are one token.


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
        An image of the same size.

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
    """Dark, grey and hatched: what the model no longer reads. The hatching tells it from a dark or grey image."""
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
