"""Training a recogniser on pictures with labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.prior.identity import model_hash
from quickmerge.recognition import LabelLoss, Recognizer
from quickmerge.training.align_words import align_words
from quickmerge.training.classify import with_data
from quickmerge.training.config import TrainingConfig
from quickmerge.training.data.images import ImageFolder
from quickmerge.training.data.labelled import PixelFormat
from quickmerge.training.loop import TrainingResult, train

__all__ = ["LabelledScenes", "collate_scenes", "feature_bytes", "pixel_format", "read_features", "train_recognizer"]

SHARE_OF_MEMORY = 0.5
"""Of the memory that is free, so much may go into features; the training needs some too."""


class Scene(Protocol):
    """An image file and the labels of what it shows, such as `quickmerge.training.data.annotated.Annotated`."""

    @property
    def path(self) -> Path: ...

    @property
    def labels(self) -> tuple[str, ...]: ...


class LabelledScenes:
    """Pictures with labels, as a recogniser is trained on them.

    An item is ``{"pixels": (3, H, W), "labels": [...]}``, or ``{"features": (M, D_v), "labels": [...]}`` once `keep`
    was given the encoder's features. The labels come in a new order each time, drawn from torch's global generator,
    which the training loop seeds for every step.

    Args:
        scenes: files and labels; what has no label is left out, and counted in ``unlabelled``.
        form: what the encoder wants to be shown.

    Raises:
        QuickmergeError: no picture has a label, or, when one is asked for, an image can't be read.
    """

    def __init__(self, scenes: Sequence[Scene], form: PixelFormat) -> None:
        used = [scene for scene in scenes if scene.labels]
        if not used:
            raise QuickmergeError(f"at least one picture must have labels, got {len(scenes)} pictures without")
        self.unlabelled = len(scenes) - len(used)
        self.pictures = used
        self.labels = [tuple(scene.labels) for scene in used]
        self.form = form
        self._images = ImageFolder([scene.path for scene in used], (form.height, form.width))
        self._features: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def pixels(self, index: int) -> Tensor:
        """One image, ``(3, H, W)`` float32, standardised."""
        return self.form.standardised(self._images[index])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One picture or its features, with its labels in a random order."""
        labels = self.labels[index]
        item: dict[str, Any] = {"labels": [labels[i] for i in torch.randperm(len(labels)).tolist()]}
        if self._features is None:
            return {**item, "pixels": self.pixels(index)}
        return {**item, "features": self._features[index]}

    def keep(self, features: Tensor) -> None:
        """From now on give out these features ``(n, M, D_v)`` instead of pixels."""
        if features.ndim != 3 or len(features) != len(self):
            raise ValueError(
                f"features must be ({len(self)}, tokens, width) for {len(self)} pictures, got {tuple(features.shape)}"
            )
        self._features = features

    def describe(self, index: int) -> str:
        """What an image is called."""
        return self._images.describe(index)

    def fingerprint(self) -> str:
        """A sha256 over labels, pixel format and a sample of the images, in hexadecimal."""
        known = f"{self._images.fingerprint()} {self.labels} {self.form}"
        return hashlib.sha256(known.encode()).hexdigest()


def collate_scenes(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch of items: stacked pixels or features, and a list of labels for each."""
    kind = "features" if "features" in items[0] else "pixels"
    return {kind: torch.stack([item[kind] for item in items]), "labels": [item["labels"] for item in items]}


def feature_bytes(recognizer: Recognizer, scenes: LabelledScenes) -> tuple[int, int]:
    """What the features of all pictures would take in half precision, and how much memory may go into them."""
    one = recognizer.features(scenes.pixels(0)[None])
    return 2 * one.numel() * len(scenes), int(SHARE_OF_MEMORY * psutil.virtual_memory().available)


def read_features(
    recognizer: Recognizer,
    scenes: LabelledScenes,
    *,
    batch: int = 16,
    half: bool = False,
    shrink: Callable[[Tensor], Tensor] | None = None,
    advance: Callable[[int], None] | None = None,
) -> Tensor:
    """The frozen encoder's features of all pictures, ``(n, M, D_v)`` in bfloat16.

    Args:
        recognizer: whose encoder reads.
        scenes: the pictures.
        batch: pictures read at once.
        half: let the encoder compute in bfloat16.
        shrink: makes fewer tokens ``(B, M', D_v)`` of some features ``(B, M, D_v)`` before they are kept.
        advance: called with the number of pictures read each time.
    """
    kept = []
    for start in range(0, len(scenes), batch):
        rows = range(start, min(start + batch, len(scenes)))
        pixels = torch.stack([scenes.pixels(index) for index in rows])
        with torch.autocast(recognizer.device.type, torch.bfloat16, enabled=half):
            features = recognizer.features(pixels)
        kept.append((features if shrink is None else shrink(features)).to("cpu", torch.bfloat16))
        if advance is not None:
            advance(len(rows))
    return torch.cat(kept)


def pixel_format(recognizer: Recognizer) -> PixelFormat:
    """What a recogniser wants to be shown."""
    config = recognizer.config
    return PixelFormat(config.image_size, config.image_size, config.mean, config.std)


def train_recognizer(
    recognizer: Recognizer,
    dataset: LabelledScenes,
    config: TrainingConfig,
    out: Path | str,
    *,
    objective: str = "paper",
    align: int = 0,
    resume: bool = False,
    fingerprint: dict[str, Any] | None = None,
) -> TrainingResult:
    """Train a recogniser in place; its encoder stays as it is.

    Args:
        recognizer: what is trained, and saved in ``out`` after the last step.
        dataset: items as `LabelledScenes` gives them.
        config: of the training loop.
        out: folder for the result, its checkpoints and metrics.
        objective: ``"paper"`` or ``"reference"``, see `quickmerge.recognition.LabelLoss`.
        align: by how many pictures with objects the projector is aligned before the first step; see
            `quickmerge.training.align_words`. 0 leaves it as it was drawn.
        resume: go on from the newest checkpoint.
        fingerprint: whatever else must be the same for a resumed run.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    loss = LabelLoss(recognizer, objective=objective)
    align = whole_number("align", align, 0)
    known = {"model": model_hash(recognizer), "objective": objective, "align": align, **(fingerprint or {})}
    if align and not resume:  # a checkpoint holds what came of it
        align_words(recognizer, dataset, pictures=align)
    return train(
        loss, dataset, config, out, collate=collate_scenes, resume=resume, fingerprint=with_data(known, dataset),
        finish=recognizer.save_pretrained,
    )  # fmt: skip
