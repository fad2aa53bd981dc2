"""The two ends of the target that its draft heads share: token embeddings, and the matrix that makes logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from quickmerge.decoding.gumiho.config import GumihoConfig
from quickmerge.errors import QuickmergeError, UnsupportedModelError

__all__ = ["Ends", "check_fit", "check_target"]


class Ends:
    """Embeddings and output matrix of a target, frozen, as its draft heads use them.

    Args:
        model: the target.
        drafted: ``(D,)`` ids of the tokens that can be drafted; None for all. Of the output matrix only their rows
            are used, and copied.
        dtype: what the heads compute in.
    """

    def __init__(self, model: PreTrainedModel, drafted: Tensor | None, dtype: torch.dtype) -> None:
        head = model.get_output_embeddings()
        weight, bias = head.weight.detach(), getattr(head, "bias", None)
        self.drafted = None if drafted is None else drafted.to(weight.device)
        if self.drafted is not None:
            weight, bias = weight[self.drafted], None if bias is None else bias[self.drafted]
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self._embedding = [model.get_input_embeddings()]
        self._scale, self._cap = _scaling(model)
        self.dtype = dtype

    @torch.no_grad()
    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings ``(..., E)`` of token ids ``(...)``."""
        out: Tensor = self._embedding[0](tokens).to(self.dtype)
        return out

    def logits(self, features: Tensor) -> Tensor:
        """What the target's output matrix makes of features ``(..., H)``: ``(..., D)``, in float32 at least."""
        # As one matrix, since torch multiplies a view of several dimensions piece by piece.
        out = F.linear(features.reshape(-1, features.shape[-1]), self.weight, self.bias)
        out = out.view(*features.shape[:-1], len(self.weight))
        out = out.to(torch.promote_types(out.dtype, torch.float32)) * self._scale
        return out if self._cap is None else self._cap * torch.tanh(out / self._cap)

    def tokens(self, index: Tensor) -> Tensor:
        """The token ids of places ``(...)`` in the logits."""
        return index if self.drafted is None else self.drafted[index]


def _scaling(model: PreTrainedModel) -> tuple[float, float | None]:
    """What some families do with logits behind the output matrix: a factor, and the height they are bent to."""
    config = model.config.get_text_config(decoder=True)
    factor = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    return float(factor), getattr(config, "final_logit_softcapping", None)


def check_target(model: object) -> None:
    """Raise UnsupportedModelError unless ``model`` is a causal LM with an output matrix that draft heads can share."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got a {name}")
    head = model.get_output_embeddings()
    if model.base_model is model or head is None or getattr(head, "weight", None) is None:
        raise UnsupportedModelError(f"{name} has no language-model head on a base decoder, which draft heads share")
    if not head.weight.is_floating_point():
        raise UnsupportedModelError(
            f"{name} has an output matrix of {head.weight.dtype}: draft heads need one of floating-point numbers"
        )


def check_fit(model: PreTrainedModel, config: GumihoConfig) -> None:
    """Raise an error unless heads of this shape can draft for ``model``.

    Raises:
        UnsupportedModelError: see `check_target`.
        QuickmergeError: the model's vocabulary or widths are others than those that the heads were made for.
    """
    check_target(model)
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    for what, wanted, given in (
        ("tokens in its vocabulary", config.vocabulary, head.shape[0]),
        ("features in its last hidden state", config.features, head.shape[1]),
        ("features in its embeddings", config.embedding, embedding.shape[1]),
    ):
        if wanted != given:
            raise QuickmergeError(
                f"model must have {wanted} {what}, as the one that the draft heads were made for, "
                f"got a {type(model).__name__} with {given}"
            )
