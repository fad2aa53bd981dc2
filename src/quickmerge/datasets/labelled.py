"""Labelled images as a classifier is trained on them: cut, mirrored and standardised."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from quickmerge.datasets.find import IMAGES
from quickmerge.datasets.images import ImageFolder, Size, open_image, opened
from quickmerge.errors import QuickmergeError

SHAPES = (3 / 4, 4 / 3)
"""Least and largest ratio of the sides of a random cut."""


class Labelled(Protocol):
    """An image file and the name of its class."""

    @property
    def path(self) -> Path: ...  # noqa: D102

    @property
    def label(self) -> str: ...  # noqa: D102


@dataclass(frozen=True)
class PixelFormat:
    """What a model wants to be shown: sides in pixels, and the mean and deviation that channels are scaled by."""

    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, processor: Any) -> PixelFormat:
        """What an image processor of transformers makes of an image.

        Raises:
            QuickmergeError: if it does not make images of one size.
        """
        named = processor.crop_size if getattr(processor, "do_center_crop", False) else processor.size
        size = dict(named or {})
        height, width = (size.get(side, size.get("shortest_edge")) for side in ("height", "width"))
        if not isinstance(height, int) or not isinstance(width, int):
            raise QuickmergeError(f"the image processor must make images of one size, got one with size {size}")
        scaled = getattr(processor, "do_normalize", True)
        mean, std = (processor.image_mean, processor.image_std) if scaled else ((0.0,) * 3, (1.0,) * 3)
        return cls(height, width, tuple(mean), tuple(std))

    def standardised(self, x: Tensor) -> Tensor:
        """Pixels ``(..., C, H, W)`` in [0, 1] as the model takes them."""
        return (x - _by_channel(self.mean)) / _by_channel(self.std)

    def plain(self, x: Tensor) -> Tensor:
        """The inverse of `standardised`."""
        return x * _by_channel(self.std) + _by_channel(self.mean)


def _by_channel(values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values)[:, None, None]


class LabelledImages(Dataset[tuple[Tensor, int]]):
    """Images with the numbers of their classes.

    To train on, each is cut out at random (a share of its area in ``area``, sides in a ratio of 3:4 to 4:3) and
    mirrored in one case of two, drawn anew each time from torch's global generator, which the training loop seeds for
    every step. To test on, the centre is taken.

    Args:
        images: files and labels.
        classes: the labels in the order of their numbers.
        form: what the model wants to be shown.
        augment: whether to cut and mirror at random.
        area: least and largest share of the area of a cut.

    Raises:
        QuickmergeError: there is no image, a label is none of the classes, or, when one is asked for, an image can't
            be read.
        ValueError: ``area`` is not a range in (0, 1].
    """

    def __init__(
        self,
        images: Sequence[Labelled],
        classes: Sequence[str],
        form: PixelFormat,
        *,
        augment: bool = True,
        area: tuple[float, float] = (0.5, 1.0),
    ) -> None:
        if not 0 < area[0] <= area[1] <= 1:
            raise ValueError(f"area must be a least and a largest share in (0, 1], got {area!r}")
        number = {label: index for index, label in enumerate(classes)}
        for image in images:
            if image.label not in number:
                raise QuickmergeError(
                    f"{image.path} is labelled {image.label!r}, which is none of {', '.join(classes)}"
                )
        self.classes = tuple(classes)
        self._labels = [number[image.label] for image in images]
        files, size = [image.path for image in images], (form.height, form.width)
        self._plain = ImageFolder(files, size)
        self._pictures = _RandomCuts(files, size, area) if augment else self._plain
        self._form, self._area = form, area if augment else None

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One image, ``(3, H, W)`` float32, standardised, and the number of its class."""
        return self._form.standardised(self._pictures[index]), self._labels[index]

    def describe(self, index: int) -> str:
        """What an image is called."""
        return self._plain.describe(index)

    def fingerprint(self) -> str:
        """A sha256 over labels, settings and a sample of the images, in hexadecimal."""
        known = f"{self._plain.fingerprint()} {self.classes} {self._labels} {self._form} {self._area}"
        return hashlib.sha256(known.encode()).hexdigest()


class _RandomCuts(ImageFolder):
    def __init__(self, files: Sequence[Path], size: Size, area: tuple[float, float]) -> None:
        super().__init__(files, size)
        self._area = area

    def _fit(self, image: Image.Image) -> Image.Image:
        share, shape, x, y, mirror = torch.rand(5).tolist()
        box = _cut(image.size, self._area[0] + share * (self._area[1] - self._area[0]), shape, x, y)
        cut = image.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        return ImageOps.mirror(cut) if mirror < 0.5 else cut


def _cut(size: tuple[int, int], area: float, shape: float, x: float, y: float) -> tuple[float, float, float, float]:
    """A box of a share of the area: ``shape`` in [0, 1) says how wide it is, ``x`` and ``y`` where it lies."""
    width, height = size
    ratio = math.exp(math.log(SHAPES[0]) + shape * (math.log(SHAPES[1]) - math.log(SHAPES[0])))
    wide = min(math.sqrt(area * width * height * ratio), width)
    high = min(math.sqrt(area * width * height / ratio), height)
    left, top = x * (width - wide), y * (height - high)
    return left, top, left + wide, top + high


# Images with labels, and as the batches that a model takes.


@dataclass(frozen=True, order=True)
class LabelledImage:
    """An image file and what it shows."""

    path: Path
    label: str


def read_labelled(folder: Path) -> list[LabelledImage]:
    """Find the images of a folder that holds one folder for each class, sorted by class and name.

    Hidden files and those that are not named as images are passed over.

    Raises:
        QuickmergeError: there is no such folder, it has fewer than two classes, a class has no image, or a file is
            not the image that its name promises. A file that breaks off later is told by `load_batch`.
    """
    if not folder.is_dir():
        raise QuickmergeError(f"there is no folder {folder}: give one that holds a folder for each class")
    classes = [path for path in _listed(folder) if path.is_dir() and not path.name.startswith(".")]
    if len(classes) < 2:
        held = f"only the class {classes[0].name!r}" if classes else "no folder"
        raise QuickmergeError(f"{folder} must hold a folder for each of at least 2 classes, got {held}")
    found: list[LabelledImage] = []
    for one in classes:
        images = [path for path in _listed(one) if path.suffix.lower() in IMAGES and path.name[0] != "."]
        if not images:
            raise QuickmergeError(f"the folder {one} of the class {one.name!r} holds no image ({' '.join(IMAGES)})")
        found += [LabelledImage(path, one.name) for path in images]
    for image in found:
        with opened(image.path) as file:
            file.verify()
    return found


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise QuickmergeError(f"the folder {folder} can't be read: {error.strerror or error}") from None


def load_batch(paths: Sequence[Path], processor: Any) -> Tensor:
    """Images as a model takes them, upright, in RGB, what was transparent in white.

    Args:
        paths: image files.
        processor: the image processor of `load_vision`.

    Returns:
        Pixel values, ``(B, 3, H, W)`` float32.

    Raises:
        QuickmergeError: there is no path, an image can't be read, or the images come out in different sizes.
    """
    if not paths:
        raise QuickmergeError("paths must name at least one image, got none")
    images = [open_image(path) for path in paths]
    pixels: list[Tensor] = [processor([image], return_tensors="pt")["pixel_values"] for image in images]
    if len(sizes := {tuple(image.shape[-2:]) for image in pixels}) > 1:
        told = " and ".join(f"{height} x {width}" for height, width in sorted(sizes))
        raise QuickmergeError(f"images of one batch must have one size, but the processor made {told}")
    return torch.cat(pixels)
