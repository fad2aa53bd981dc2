"""Training Gumiho's draft heads for a frozen language model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, number_at_least
from quickmerge.models.decoder import find_decoder
from quickmerge.models.identity import model_hash
from quickmerge.models.part import model_label
from quickmerge.sampling import evenly
from quickmerge.speculative.gumiho import Gumiho, GumihoNetwork, LossWeights, gumiho_losses
from quickmerge.speculative.gumiho.network import Ends, check_target
from quickmerge.speculative.gumiho.texts import DraftTexts, collate_texts
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Objective
from quickmerge.training.sharding import place_frozen

__all__ = ["GumihoText", "feature_scale", "train_gumiho"]

SAMPLES = 16
"""Texts that the scale of features is measured on."""


class GumihoText(Objective):
    """The loss of draft heads on texts; see `quickmerge.speculative.gumiho.gumiho_losses`.

    Args:
        model: the target; it is frozen and stays outside the module tree.
        network: what is trained.
        weights: of the losses.
        share: of the features, how many the more expensive losses are taken at, in (0, 1].
        noise: on the features that are read.
        dtype: of the target's embeddings and output matrix, where the heads read and write.

    Raises:
        ValueError: for a setting out of range.
    """

    uses_every_parameter: ClassVar[bool] = True

    def __init__(
        self,
        model: PreTrainedModel,
        network: GumihoNetwork,
        *,
        weights: LossWeights | None = None,
        share: float = 1.0,
        noise: float = 0.2,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"share must be a number in (0, 1], got {share!r}")
        number_at_least("noise", noise, 0)
        model.requires_grad_(False)
        model.eval()
        self._model = [model]  # in a list, so that it is no part of what is trained
        self._ends: list[Ends] = []
        self.network, self.weights = network, weights or LossWeights()
        self.share, self.noise, self.dtype = float(share), float(noise), dtype

    def frozen(self) -> Sequence[tuple[nn.Module, Sequence[nn.Module]]]:
        """The target."""
        return [(self._model[0], list(find_decoder(self._model[0]).layers))]

    def place(self, device: torch.device) -> None:
        """Move the target along."""
        place_frozen(self._model[0], device)
        self._ends = [self._made()]

    def _made(self) -> Ends:
        return Ends(self._model[0], getattr(self.network, "drafted", None), self.dtype)

    def forward(self, batch: dict[str, Tensor], progress: float) -> dict[str, Tensor]:
        """Losses of a batch of texts, which hold features or are read by the target now."""
        features = batch.get("features")
        if features is None:
            with torch.no_grad():
                features = self._model[0].base_model(batch["ids"], use_cache=False).last_hidden_state
        ends = self._ends[0] if self._ends else self._made()
        return gumiho_losses(
            self.network, ends, batch["ids"], features.to(self.dtype), batch["counts"], weights=self.weights,
            share=self.share, noise=self.noise, progress=progress,
        )  # fmt: skip


@torch.no_grad()
def feature_scale(model: PreTrainedModel, texts: DraftTexts) -> float:
    """Root mean square of the target's features over some texts, to three digits, so that it is always the same."""
    total = count = 0.0
    for index in evenly(range(len(texts)), SAMPLES):
        item = texts[index]
        features = item.get("features")
        if features is None:
            features = model.base_model(item["ids"][None].to(model.device), use_cache=False).last_hidden_state
        total += float(features.double().square().sum())
        count += features.numel()
    return float(f"{(total / count) ** 0.5:.3g}")


def train_gumiho(
    model: PreTrainedModel,
    texts: DraftTexts,
    config: TrainingConfig,
    out: Path | str,
    *,
    name: str,
    draft_vocabulary: int | None = None,
    weights: LossWeights | None = None,
    share: float = 1.0,
    noise: float = 0.2,
    resume: bool = False,
    half: bool = False,
    **shape: Any,
) -> TrainingResult:
    """Train draft heads for a frozen language model and save them in ``out``.

    Args:
        model: a causal LM; it is frozen, and cast to bfloat16 where ``config.precision`` is ``"bf16"``.
        texts: what is learnt from.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        name: what the model is called in messages.
        draft_vocabulary: let only so many tokens be drafted, those that are most often predicted in the texts.
        weights: of the losses.
        share: of the features, how many the cross-entropies and the parallel heads learn from, drawn in every step.
        noise: on the features that are read.
        resume: go on from the newest checkpoint.
        half: store the heads in float16.
        **shape: further fields of `GumihoConfig`.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    check_target(model)
    trained_for = {"model": model_label(name), "hash": model_hash(model)}
    if config.precision == "bf16":
        model.to(torch.bfloat16)
    embedding = model.get_input_embeddings().weight
    if texts.largest >= len(embedding):
        raise QuickmergeError(f"texts must be made of the model's {len(embedding)} tokens, got token {texts.largest}")
    drafted = None if draft_vocabulary is None else texts.frequent(draft_vocabulary)[0]
    scales = {
        "feature_scale": feature_scale(model, texts),
        "embedding_scale": float(f"{float(embedding.detach().float().square().mean()) ** 0.5:.3g}"),
    }
    torch.manual_seed(config.seed)
    heads = Gumiho.new(model, drafted=drafted, trained_for=trained_for, **{**scales, **shape})
    objective = GumihoText(
        model, heads.network, weights=weights, share=share, noise=noise,
        dtype=torch.bfloat16 if config.precision == "bf16" else torch.float32,
    )  # fmt: skip
    fingerprint = {
        "heads": json.loads(heads.config.to_json()), "weights": asdict(objective.weights), "share": share,
        "noise": noise, "data": texts.fingerprint(),
    }  # fmt: skip
    return train(
        objective, texts, config, out, collate=collate_texts, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: heads.save_pretrained(folder, torch.float16 if half else None),
    )  # fmt: skip
