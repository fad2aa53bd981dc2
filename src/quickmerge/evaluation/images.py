"""Images with labels, and as the batches that a model takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.training.data.find import IMAGES
from quickmerge.training.data.images import evenly, open_image, opened

__all__ = ["LabelledImage", "evenly", "load_batch", "read_labelled"]


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
