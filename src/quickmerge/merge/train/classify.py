"""Fine-tuning a vision transformer to classify images."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.encoder import find_encoder
from quickmerge.models.identity import model_hash
from quickmerge.models.part import save_model
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Dataset, Objective, with_data

BACKBONE, HEAD = "backbone", "head"


def new_classifier(model: PreTrainedModel, classes: Sequence[str]) -> PreTrainedModel:
    """A classifier of ``classes`` on the vision transformer of ``model``, its head drawn from the global generator.

    A classifier of the same classes in the same order is given back as it is.

    Raises:
        UnsupportedModelError: if transformers has no image classifier of this kind.
        QuickmergeError: if there are fewer than two classes, or one twice.
    """
    from transformers import AutoModelForImageClassification

    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise QuickmergeError(f"classes must be at least two different names, got {list(classes)}")
    named = [str(model.config.id2label.get(index)) for index in range(len(classes))]
    if is_classifier(model) and named == list(classes) and model.config.num_labels == len(classes):
        return model
    source = find_encoder(model).base
    config = type(model.config).from_dict(model.config.to_dict())
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: index for index, label in enumerate(classes)}
    try:
        made: PreTrainedModel = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
    except ValueError:
        raise UnsupportedModelError(
            f"transformers has no image classifier around a {type(model).__name__} "
            f"(model_type {model.config.model_type!r})"
        ) from None
    # What is not in the other is a pooler that the classifier leaves out, or has and does not use.
    missing, _ = find_encoder(made).base.load_state_dict(source.state_dict(), strict=False)
    used = [name for name in missing if not name.startswith(("pooler.", "head."))]
    if used:
        raise UnsupportedModelError(f"{type(model).__name__} lacks weights of {type(made).__name__}: {', '.join(used)}")
    return made.to(next(model.parameters()).device).eval()


def is_classifier(model: nn.Module) -> bool:
    """True if a model gives one set of logits for an image."""
    return isinstance(model, PreTrainedModel) and "ImageClassification" in type(model).__name__


def classify(model: PreTrainedModel, pixels: Tensor) -> Tensor:
    """Logits ``(B, classes)`` of images ``(B, 3, H, W)`` of any size that patches fill."""
    more: dict[str, Any] = {}
    known = inspect.signature(model.forward).parameters
    config = getattr(model.config, "vision_config", model.config)
    size = getattr(config, "image_size", None)
    fits = size is None or tuple(pixels.shape[-2:]) == ((size, size) if isinstance(size, int) else tuple(size))
    if not fits and "interpolate_pos_encoding" in known:
        more["interpolate_pos_encoding"] = True
    logits: Tensor = model(pixels, **more).logits
    return logits


class Classify(Objective):
    """Cross-entropy of a classifier on a batch ``[pixels (B, 3, H, W), labels (B,)]``.

    Args:
        model: an image classifier, trained in place.
        smoothing: share of the target that is spread over all classes.
        backbone_rate: learning rate of the vision transformer as a share of that of the head; 0 trains the head alone.

    Raises:
        ValueError: for a setting out of range, or a model that is no image classifier.
    """

    uses_every_parameter = False

    def __init__(self, model: PreTrainedModel, *, smoothing: float = 0.1, backbone_rate: float = 0.1) -> None:
        super().__init__()
        check_classifier(model)
        check_share("smoothing", smoothing, 0.0)
        check_share("backbone_rate", backbone_rate, 0.0)
        self.model = model
        self.smoothing = smoothing
        self.backbone_rate = backbone_rate
        inside = set(find_encoder(model).base.parameters())
        self._groups = {name: BACKBONE if value in inside else HEAD for name, value in self.named_parameters()}
        if backbone_rate == 0:
            for value in inside:
                value.requires_grad_(False)

    def group_of(self, name: str) -> str:  # noqa: D102
        return self._groups[name]

    def rate_of(self, group: str, progress: float) -> float:  # noqa: D102
        return self.backbone_rate if group == BACKBONE else 1.0

    def forward(self, batch: Sequence[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, and the share of images that the classifier is right about."""
        pixels, labels = batch
        logits = classify(self.model, pixels).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        return {"loss": loss, "accuracy": accuracy(logits, labels)}


def train_classifier(
    model: PreTrainedModel,
    processor: Any,
    dataset: Dataset,
    config: TrainingConfig,
    out: Path,
    *,
    smoothing: float = 0.1,
    backbone_rate: float = 0.1,
    resume: bool = False,
) -> TrainingResult:
    """Fine-tune a classifier and save it in ``out`` as transformers does, with its image processor.

    Args:
        model: an image classifier; `new_classifier` makes one of any vision transformer. Trained in place.
        processor: the image processor that is saved beside it.
        dataset: ``(pixels (3, H, W), label)`` by index.
        config: settings of the loop.
        out: folder for the model, checkpoints and metrics.
        smoothing: see `Classify`.
        backbone_rate: see `Classify`.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    objective = Classify(model, smoothing=smoothing, backbone_rate=backbone_rate)
    fingerprint = {"model": model_hash(model), "smoothing": smoothing, "backbone_rate": backbone_rate}
    return train(
        objective, dataset, config, out, resume=resume, fingerprint=with_data(fingerprint, dataset),
        finish=lambda folder: save_model(folder, model, processor),
    )  # fmt: skip


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of the images ``(B, classes)`` whose largest logit is that of their label ``(B,)``."""
    return (logits.detach().argmax(-1) == labels).float().mean()


def check_classifier(model: object) -> None:
    """Raise UnsupportedModelError unless ``model`` is an image classifier on a vision transformer."""
    if not isinstance(model, PreTrainedModel) or not is_classifier(model):
        raise UnsupportedModelError(
            f"model must be an image classifier such as AutoModelForImageClassification loads, got a "
            f"{type(model).__name__}; `quickmerge train classifier` makes one"
        )
    find_encoder(model)


def check_share(name: str, value: object, least: float) -> None:
    """Raise ValueError unless ``value`` is a number from ``least`` to 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= 1:
        raise ValueError(f"{name} must be a number in [{least:g}, 1], got {value!r}")


def evaluate(model: PreTrainedModel, dataset: Dataset, batch: int = 16) -> float:
    """Share of the images of a dataset that a classifier, as it stands, is right about."""
    right, device = 0.0, next(model.parameters()).device
    with torch.inference_mode():
        for start in range(0, len(dataset), batch):
            items = [dataset[index] for index in range(start, min(start + batch, len(dataset)))]
            pixels = torch.stack([pixels for pixels, _ in items]).to(device)
            labels = torch.tensor([label for _, label in items], device=device)
            right += float(accuracy(classify(model, pixels), labels)) * len(items)
    return right / len(dataset)
