"""Training an ordinary language model on the texts of a CALM: what the CALM is set beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.models.compat import causal_lm_names
from quickmerge.prior.identity import model_hash
from quickmerge.training.calm_texts import CalmTexts
from quickmerge.training.classify import save_model
from quickmerge.training.config import TrainingConfig
from quickmerge.training.loop import TrainingResult, train
from quickmerge.training.objective import Objective

__all__ = ["DiscreteTexts", "new_discrete", "train_discrete"]


class DiscreteTexts(Objective):
    """The cross-entropy of the next token on windows ``(B, L)`` of token ids, in nats; pads are no tokens.

    Args:
        model: a causal LM of transformers, which is trained.
        pad: id of the pad, which may stand before a text, and behind its end.
    """

    def __init__(self, model: PreTrainedModel, pad: int) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, batch: Tensor, progress: float) -> dict[str, Tensor]:
        """Mean over all tokens of a batch that another stands before."""
        there = batch != self.pad
        # Pads behind a text are where no token of it looks; those in front have to be hidden.
        mask = None if bool(there[:, 0].all()) else there.long()
        logits = self.model(input_ids=batch, attention_mask=mask, use_cache=False).logits[:, :-1]
        counts = there[:, 1:] & there[:, :-1]
        nats = F.cross_entropy(logits[counts].float(), batch[:, 1:][counts], reduction="sum")
        # A batch without such a token has the loss 0, and a gradient.
        return {"loss": nats / counts.sum().clamp_min(1)}


def new_discrete(texts: CalmTexts, backbone: dict[str, Any], seed: int = 0) -> PreTrainedModel:
    """An untrained causal LM for some texts.

    Args:
        texts: they give the vocabulary, the pad's id included, and the ids of the end token and the pad.
        backbone: config of a causal LM of transformers as a dict with ``model_type``.
        seed: of the weights.

    Raises:
        QuickmergeError: there is no such kind of model, or it has another vocabulary.
    """
    settings = dict(backbone)
    kind = settings.pop("model_type", None)
    if kind not in causal_lm_names():
        raise QuickmergeError(
            "backbone must have a model_type that transformers has a causal language model of, such as 'llama', "
            f"got {kind!r}{near_match(str(kind), causal_lm_names())}"
        )
    given = settings.pop("vocab_size", texts.vocabulary)
    if given != texts.vocabulary:
        raise QuickmergeError(f"vocab_size of backbone must be that of the texts, {texts.vocabulary}, got {given}")
    ends = {"pad_token_id": texts.pad, "eos_token_id": texts.eos, "bos_token_id": None}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**ends, **settings, "vocab_size": given})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return model


def train_discrete(
    model: PreTrainedModel,
    texts: CalmTexts,
    config: TrainingConfig,
    out: Path | str,
    *,
    tokenizer: Any = None,
    resume: bool = False,
) -> TrainingResult:
    """Train an ordinary language model on the texts of a CALM and save it in ``out``.

    Args:
        model: trained in place; `new_discrete` makes one.
        texts: windows, of single tokens or of a CALM's chunks, which are read token by token.
        config: settings of the loop.
        out: folder for config.json, model.safetensors, checkpoints and metrics.
        tokenizer: is saved beside the model.
        resume: go on from the newest checkpoint.

    Raises:
        QuickmergeError, ValueError: for anything that does not fit; see `quickmerge.training.train`.
    """
    if model.config.vocab_size != texts.vocabulary:
        raise QuickmergeError(
            f"vocab_size of the model must be that of the texts, {texts.vocabulary}, got {model.config.vocab_size}"
        )
    # The hash is of the untrained weights: another size or seed is another run.
    fingerprint = {"model": type(model).__name__, "weights": model_hash(model), "data": texts.fingerprint()}
    return train(
        DiscreteTexts(model, texts.pad), texts, config, out, resume=resume, fingerprint=fingerprint,
        finish=lambda folder: save_model(folder, model.eval(), tokenizer),
    )  # fmt: skip
