"""Sizes given as one number or two."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.images import open_image as open_image
from quickmerge.images import opened as opened
from quickmerge.images import upright as upright
from quickmerge.images import upright_size as upright_size
from quickmerge.sampling import evenly

Size: TypeAlias = int | tuple[int, int]


def height_and_width(size: Size, name: str = "size") -> tuple[int, int]:
    """``224`` or ``(224, 320)`` as height and width in pixels; ``name`` is what it was given for.

    Raises:
        ValueError: not one or two whole numbers of at least 1.
    """
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return whole_number(name, height), whole_number(name, width)


# Images as tensors of one size.


SAMPLES = 64


class ImageFolder(Dataset[Tensor]):
    """Images, each scaled to cover ``size`` and cut to it around its centre, upright, and without transparency.

    Args:
        files: image files, or opened images such as a column of a dataset gives.
        size: pixels of both sides, or height and width.
        channels: 3 for RGB, 1 for grey.

    Raises:
        ValueError: ``size`` or ``channels`` is not one of these.
        QuickmergeError: when an image is asked for that can't be read.
    """

    def __init__(self, files: Sequence[Path | Image.Image], size: Size, channels: int = 3) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels!r}")
        self.height, self.width = height_and_width(size)
        self.channels = channels
        self._files = files
        if not files:
            raise QuickmergeError("there are no images to train on")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Tensor:
        """One image, ``(channels, H, W)`` float32 in [0, 1]."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        image = self._open(index)
        pixels = torch.from_numpy(np.atleast_3d(np.array(image)))
        return pixels.permute(2, 0, 1).contiguous() / 255

    def describe(self, index: int) -> str:
        """What an image is called: its file's name, or its number counted from 1."""
        path = self._path(index)
        return path.name if path else f"image {index % len(self) + 1}"

    def fingerprint(self) -> str:
        """A sha256 over the number of images and the pixels of up to 64 of them, spread evenly, in hexadecimal."""
        digest = hashlib.sha256(f"{len(self)} {self.channels} {self.height} {self.width}".encode())
        for index in evenly(range(len(self)), SAMPLES):
            digest.update((self[index] * 255).round().to(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _open(self, index: int) -> Image.Image:
        path = self._path(index)
        if path is not None:
            return self._fit(open_image(path))
        # of a column of a dataset this decodes it
        return self._fit(upright(self._files[index], self.describe(index)))  # type: ignore[arg-type]

    def _fit(self, image: Image.Image) -> Image.Image:
        """An upright image in RGB as it is given out."""
        image = image if self.channels == 3 else image.convert("L")
        return ImageOps.fit(image, (self.width, self.height), Image.Resampling.BICUBIC)

    def _path(self, index: int) -> Path | None:
        # a column of a dataset holds no paths, and would decode an image to tell
        source = self._files[index] if isinstance(self._files, list | tuple) else None
        return source if isinstance(source, Path) else None
