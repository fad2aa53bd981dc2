"""Images as tensors of one size."""

from __future__ import annotations

import hashlib
import struct
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.errors import QuickmergeError
from quickmerge.training.data.fit import Size, height_and_width

UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are broken, each decoder in its own way."""
MOST_PIXELS = 128 * 2**20
"""Larger images are not decoded: a small file may claim any size, and take all memory."""
SAMPLES = 64
T = TypeVar("T")
TURNED = (5, 6, 7, 8)
"""Orientations in EXIF by which width and height change places."""


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file whose size is known and allowed, and whose pixels are not decoded yet.

    Whatever goes wrong with it inside the ``with`` block is told in one sentence.

    Raises:
        QuickmergeError: there is no such file, it is no image, it breaks off, or it has more than `MOST_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is stricter
            image = Image.open(path)
        with image:
            if image.width * image.height > MOST_PIXELS:
                raise Image.DecompressionBombError
            yield image
    except QuickmergeError:
        raise
    except UNREADABLE as error:
        raise QuickmergeError(f"{path} can't be read as an image: {reason(error)}") from None


def open_image(path: Path) -> Image.Image:
    """An image file as it is meant to be seen: decoded, upright, in RGB, and white where it was transparent.

    Raises:
        QuickmergeError: it can't be read, or is too large; see `opened`.
    """
    with opened(path) as image:
        return upright(image)


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of `open_image`, without decoding a pixel.

    Raises:
        QuickmergeError: it can't be read, or is too large; see `opened`.
    """
    with opened(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation) in TURNED else (width, height)


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its camera was held, in RGB, and white where it was transparent."""
    return opaque(ImageOps.exif_transpose(image)).convert("RGB")


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
            with opened(path) as image:
                return self._fit(image)
        try:
            source = self._files[index]  # of a column of a dataset this decodes it
            assert isinstance(source, Image.Image)
            return self._fit(source)
        except UNREADABLE as error:
            raise QuickmergeError(f"{self.describe(index)} can't be read as an image: {reason(error)}") from None

    def _fit(self, image: Image.Image) -> Image.Image:
        upright = opaque(ImageOps.exif_transpose(image)).convert("RGB" if self.channels == 3 else "L")
        return ImageOps.fit(upright, (self.width, self.height), Image.Resampling.BICUBIC)

    def _path(self, index: int) -> Path | None:
        # a column of a dataset holds no paths, and would decode an image to tell
        source = self._files[index] if isinstance(self._files, list | tuple) else None
        return source if isinstance(source, Path) else None


def evenly(items: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the items, evenly taken, in their order."""
    count = min(most, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def opaque(image: Image.Image) -> Image.Image:
    """An image of 8 bits a channel; what was transparent is white."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would clip instead of scale
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image
    layer = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)


def reason(error: BaseException) -> str:
    """Why an image can't be read, in a few words."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, UnidentifiedImageError):
        return "its content is of no known image format"
    if isinstance(error, Image.DecompressionBombError):
        return f"it has more than {MOST_PIXELS // 10**6} million pixels"
    return str(error) or type(error).__name__
