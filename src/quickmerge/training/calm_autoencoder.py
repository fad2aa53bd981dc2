"""Training CALM's autoencoder: the first of its two stages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quickmerge.continuous.autoencoder import CalmAutoencoder
from quickmerge.continuous.autoencoder_config import CalmAutoencoderConfig
from quickmerge.continuous.cross_entropy import Negatives
from quickmerge.errors import QuickmergeError
from quickmerge.prior.identity import model_hash
from quickmerge.training.calm_texts import CalmTexts
from quickmerge.training.classify import save_model
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Objective

__all__ = ["CalmAutoencoderTexts", "new_autoencoder", "train_calm_autoencoder"]


class CalmAutoencoderTexts(Objective):
    """The loss of an autoencoder on windows ``(B, T K)`` of token ids; see `CalmAutoencoder.forward`.

    Args:
        model: what is trained.
        negatives: for a sampled cross-entropy; None for the exact one.
    """

    def __init__(self, model: CalmAutoencoder, negatives: Negatives | None = None) -> None:
        super().__init__()
        self.model, self.negatives = model, negatives

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """Losses of a batch; ``accuracy`` is that of training, with hidden tokens and dropped features."""
        told = self.model(batch, negatives=self.negatives)
        return {name: value for name, value in told.items() if value is not None}


def new_autoencoder(
    texts: CalmTexts, *, embeddings: Tensor | None = None, seed: int = 0, **shape: Any
) -> CalmAutoencoder:
    """An untrained autoencoder for some texts.

    Args:
        texts: they give the vocabulary, the size of a chunk and the ids of the end token and the pad.
        embeddings: ``(V', D)`` of a language model with the same tokenizer, to begin from.
        seed: of the weights.
        **shape: further fields of `CalmAutoencoderConfig`.

    Raises:
        ValueError: naming a setting that is out of range.
    """
    torch.manual_seed(seed)
    model = CalmAutoencoder(
        CalmAutoencoderConfig(
            vocab_size=texts.vocabulary, patch=texts.patch, pad_token_id=texts.pad, eos_token_id=texts.eos, **shape
        )
    )
    if embeddings is not None:
        model.load_pretrained_embeddings(embeddings, seed)
    return model


def train_calm_autoencoder(
    model: CalmAutoencoder,
    texts: CalmTexts,
    config: TrainingConfig,
    out: Path | str,
    *,
    sampled: int | None = None,
    tokenizer: Any = None,
    resume: bool = False,
) -> TrainingResult:
    """Train an autoencoder and save it in ``out``.

    Args:
        model: trained in place; `new_autoencoder` makes one.
        texts: windows of chunks.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        sampled: hold so many sampled words against the right one in each step, instead of the whole vocabulary.
        tokenizer: is saved beside the model.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    wanted = {"vocab_size": texts.vocabulary, "patch": texts.patch, "pad_token_id": texts.pad,
              "eos_token_id": texts.eos}  # fmt: skip
    for name, value in wanted.items():
        if (given := getattr(model.config, name)) != value:
            raise QuickmergeError(f"{name} of the autoencoder must be that of the texts, {value}, got {given}")
    negatives = None if sampled is None else Negatives(texts.counts(), sampled)
    settings = {
        key: value for key, value in model.config.to_dict().items() if key in CalmAutoencoderConfig.__annotations__
    }
    # The hash is of the untrained weights, so that beginning from other embeddings is another run.
    fingerprint = {"autoencoder": settings, "weights": model_hash(model), "sampled": sampled,
                   "data": texts.fingerprint()}  # fmt: skip
    return train(
        CalmAutoencoderTexts(model, negatives), texts, config, out, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: save_model(folder, model.eval(), tokenizer),
    )  # fmt: skip
