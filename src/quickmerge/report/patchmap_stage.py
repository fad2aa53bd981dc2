"""Which patches of a picture or a video are one token, after some depth of a model; and the pictures themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.images import as_rgb
from quickmerge.report.text import one_line

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
        raise QuickmergeError("frames must be at least one picture, got none")
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
