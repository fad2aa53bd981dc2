"""The losses of DynamicViT (arXiv 2106.02034, eq. 13 to 17), each a scalar in float32 at least."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.merge.reducers.dynamicvit import BACKBONE, DynamicViT, Predictor, even_stages
from quickmerge.merge.tokens.removal import gumbel_keep
from quickmerge.merge.train.classify import accuracy, check_classifier, check_share, classify
from quickmerge.merge.vision.policy import policy_vit
from quickmerge.models.encoder import find_encoder
from quickmerge.models.identity import model_hash
from quickmerge.models.part import model_label, save_model
from quickmerge.together import write_together
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Dataset, Objective, with_data
from quickmerge.training.sharding import place_frozen


def ratio_loss(masks: Sequence[Tensor], keep: float) -> Tensor:
    """How far the shares that are kept are from ``keep``, ``keep^2``...: the mean square over images and stages.

        ``R = (1/S) sum_s mean_b (mean_i D^s_bi - keep^s)^2``

    Args:
        masks: of each stage, ``(B, N)`` of 0 and 1.
        keep: share that each stage should leave of those before it.
    """
    each = [(mask.mean(-1) - keep ** (stage + 1)).square().mean() for stage, mask in enumerate(masks)]
    return torch.stack(each).mean()


def logit_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``KL(teacher || student)`` of the class probabilities, the mean over a batch of logits ``(B, classes)``."""
    told, wanted = (_precise(x).log_softmax(-1) for x in (student, teacher))
    return F.kl_div(told, wanted, reduction="batchmean", log_target=True)


def feature_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of the last features ``(B, N, C)`` over the patches of ``mask (B, N)``; 0 if it has none.

    The mask says where to look and takes no gradient.
    """
    kept = mask.detach()[..., None]
    apart = (_precise(student) - _precise(teacher)).square() * kept
    return apart.sum() / (kept.sum() * student.shape[-1]).clamp_min(1)


def _precise(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


# Training DynamicViT: predictors that learn which patches to drop, from the classifier that they are dropped in.


UNTRAINED = ("cls_token", "class_embedding", "distillation_token", "position_embedding", "position_embeddings")
"""Ends of the names of what stays as it was: class tokens and position embeddings."""

PREDICTORS, NETWORK = "predictors", "backbone"
STALE = re.compile(rf"{BACKBONE}/(model(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index\.json)")
"""What an earlier backbone may have had that the new one has not."""


@dataclass(frozen=True)
class DynamicViTSettings:
    """How DynamicViT is trained; the defaults are the paper's for DeiT-S.

    Args:
        classes: weight of the cross-entropy.
        ratio: weight of the loss that holds the kept shares at their targets.
        logits: weight of the divergence from the teacher's class probabilities.
        features: weight of the squared distance from the teacher's last features.
        smoothing: share of the target that is spread over all classes.
        backbone_rate: learning rate of the backbone as a share of that of the predictors; 0 leaves it untrained.
        frozen: share of the training in which the backbone stands still at first (5 of 30 epochs).
        temperature: of the Gumbel-softmax.

    Raises:
        ValueError: for a setting out of range.
    """

    classes: float = 1.0
    ratio: float = 2.0
    logits: float = 0.5
    features: float = 0.5
    smoothing: float = 0.1
    backbone_rate: float = 0.01
    frozen: float = 1 / 6
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("smoothing", "backbone_rate", "frozen"):
            check_share(name, getattr(self, name), 0.0)
        for name in ("classes", "ratio", "logits", "features"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {value!r}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}")


class DynamicViTObjective(Objective):
    """The loss of DynamicViT on a batch ``[pixels (B, 3, H, W), labels (B,)]`` (arXiv 2106.02034, eq. 18).

    The model reads every patch, and a mask says which count (`quickmerge.merge.vision.policy`); masks are drawn by
    Gumbel-softmax from torch's global generator. A copy of the unmodified model given is the teacher.

    Args:
        model: an image classifier, trained in place.
        keep: share of the patches that each stage should leave, in (0, 1).
        layers: blocks in front of which patches are dropped; default 3, 6, 9 of 12.
        settings: weights and rates.

    Raises:
        ValueError: for a setting out of range, or a model that is no image classifier.
    """

    uses_every_parameter = False

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        keep: float = 0.7,
        layers: Sequence[int] | None = None,
        settings: DynamicViTSettings | None = None,
    ) -> None:
        super().__init__()
        check_classifier(model)
        if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep < 1:
            raise ValueError(f"keep must be a number in (0, 1), got {keep!r}")
        encoder = find_encoder(model)
        self.layers = even_stages(len(encoder), 3) if layers is None else tuple(layers)
        self.keep = float(keep)
        self.settings = settings or DynamicViTSettings()
        width = encoder.config.hidden_size
        self.predictors = nn.ModuleList(Predictor(width) for _ in self.layers)
        self.predictors.to(next(model.parameters()).device)
        policy_vit(model, self.layers, self.decide)  # Blocks that don't exist are told now.
        teacher = _Teacher(deepcopy(model))
        self._outside = [teacher]  # in a list, so that it is no part of the module and of checkpoints
        for name, value in model.named_parameters():
            still = self.settings.backbone_rate == 0 or name.removesuffix(".weight").endswith(UNTRAINED)
            value.requires_grad_(not still)
        self.model = model

    def frozen(self) -> Sequence[tuple[nn.Module, Sequence[nn.Module]]]:
        """The teacher; the classifier that learns from it stays whole, with what is trained."""
        teacher = self._outside[0].model
        return [(teacher, [block.module for block in find_encoder(teacher).blocks])]

    def place(self, device: torch.device) -> None:
        """Move the teacher."""
        place_frozen(self._outside[0].model, device)

    def group_of(self, name: str) -> str:  # noqa: D102
        return PREDICTORS if name.startswith("predictors.") else NETWORK

    def rate_of(self, group: str, progress: float) -> float:  # noqa: D102
        if group == PREDICTORS:
            return 1.0
        return self.settings.backbone_rate if progress >= self.settings.frozen else 0.0

    def decide(self, stage: int, patches: Tensor, mask: Tensor) -> Tensor:
        """Draw which patches a stage keeps."""
        return gumbel_keep(self.predictors[stage](patches, mask), self.settings.temperature)

    def forward(self, batch: Sequence[Tensor], progress: float) -> dict[str, Tensor]:
        """The loss, its terms before weighting, the share kept at the end and the share of right answers."""
        pixels, labels = batch
        with policy_vit(self.model, self.layers, self.decide) as run:
            logits = classify(self.model, pixels).float()
        wanted, features = self._outside[0](pixels, run.prefix)
        weights, masks = self.settings, run.masks
        terms = {
            "classes": F.cross_entropy(logits, labels, label_smoothing=weights.smoothing),
            "ratio": ratio_loss(masks, self.keep),
            "logits": logit_loss(logits, wanted),
            "features": feature_loss(run.features, features, masks[-1]),
        }
        loss = torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
        told = {name: value.detach() for name, value in terms.items()}
        return {"loss": loss, **told, "kept": masks[-1].detach().mean(), "accuracy": accuracy(logits, labels)}


class _Teacher:
    """The model as it was before: what it answers, and the last features of its patches, without a gradient."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval().requires_grad_(False)
        self._last: Tensor | None = None
        find_encoder(model).base.register_forward_hook(self._remember)

    def _remember(self, module: nn.Module, args: Any, output: Any) -> None:
        self._last = output.last_hidden_state

    @torch.no_grad()
    def __call__(self, pixels: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
        logits = classify(self.model, pixels)
        assert self._last is not None
        features, self._last = self._last[:, prefix:], None
        return logits, features


def train_dynamicvit(
    model: PreTrainedModel,
    processor: Any,
    dataset: Dataset,
    config: TrainingConfig,
    out: Path,
    *,
    name: str,
    keep: float = 0.7,
    layers: Sequence[int] | None = None,
    settings: DynamicViTSettings | None = None,
    resume: bool = False,
) -> TrainingResult:
    """Train DynamicViT on a classifier and save it in ``out``, for `DynamicViT.from_pretrained`.

    The fine-tuned classifier goes to ``out/backbone`` as transformers saves it; one that was not trained is only named,
    with a hash of its weights.

    Args:
        model: an image classifier, trained in place; its copy is the teacher.
        processor: the image processor that is saved beside the backbone.
        dataset: ``(pixels (3, H, W), label)`` by index; labels are numbers of the model's classes.
        config: settings of the loop.
        out: folder for predictors, backbone, checkpoints and metrics.
        name: what the model is called.
        keep: share of the patches that each stage leaves.
        layers: blocks in front of which patches are dropped; default 3, 6, 9 of 12.
        settings: weights and rates.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    torch.manual_seed(config.seed)
    base = model_hash(model) if isinstance(model, PreTrainedModel) else None
    objective = DynamicViTObjective(model, keep=keep, layers=layers, settings=settings)
    chosen = {"keep": keep, "layers": list(objective.layers), **asdict(objective.settings)}

    def finish(folder: Path) -> None:
        trained = objective.settings.backbone_rate > 0
        known = {
            "model": BACKBONE if trained else model_label(name), "base": model_label(name), "hash": model_hash(model),
            "base_hash": base, "settings": chosen, "steps": config.steps,
        }  # fmt: skip
        predictors = deepcopy(objective.predictors).eval().requires_grad_(False)
        method = DynamicViT(keep, predictors, objective.layers, known)

        def fill(work: Path) -> None:
            if trained:
                save_model(work / BACKBONE, model, processor)
            method.save_pretrained(work)

        write_together(folder, fill, STALE)

    fingerprint = with_data({"model": base, **chosen}, dataset)
    return train(objective, dataset, config, out, resume=resume, fingerprint=fingerprint, finish=finish)
