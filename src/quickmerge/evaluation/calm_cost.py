"""What a token costs, written or learnt from: of a CALM, whose parts work once per K tokens, and of its yardstick.

Operations are two for each weight of a matrix that a vector passes. Lookups, norms and activations are left out.

- Reading: ``2 P`` for the P weights of backbone and input network, and ``4 n H d`` in each layer for attention to n
  entries. An ordinary model has its output matrix too. A CALM does this once in K tokens, to 1/K as many entries.
- The head: once for each draw (``~ 6 C^2`` a block), as are the autoencoder's decoder and its ``K V d`` logits.
- Learning: three times the forward pass, except the encoder, which is frozen. The head draws N samples a chunk, and the
  loss compares them with M targets.

What the head, the encoder and the decoder spend is counted by running them on one chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from quickmerge.errors import UnsupportedModelError, number_at_least, whole_number
from quickmerge.evaluation.calm import is_calm
from quickmerge.models.compat import Conv1D

__all__ = ["TokenCost", "autoencoder_training_cost", "counted", "training_cost", "writing_cost"]

BACKWARD = 3
"""Forward and backward together, in forward passes."""


@dataclass(frozen=True)
class TokenCost:
    """Operations for one token of text, by where they are spent.

    Attributes:
        reading: matrices of the transformer, and of the network that makes a vector of K tokens.
        attention: scores and sums over earlier entries.
        output: the output matrix, or head and decoder.
        frozen: the encoder in training.
    """

    reading: float
    attention: float
    output: float
    frozen: float = 0.0

    @property
    def total(self) -> float:
        """All together."""
        return self.reading + self.attention + self.output + self.frozen


def writing_cost(model: Any, context: float, draws: int = 1) -> TokenCost:
    """Operations of writing a token when ``context`` tokens stand before it, with a cache.

    Args:
        model: a CALM or a causal LM of transformers.
        context: tokens before, on average.
        draws: of the head for each chunk: 1, or as many as sampling at a temperature takes. Ordinary models need one.

    Raises:
        UnsupportedModelError: the model has matrices that are no linear layers.
        ValueError: a number is out of range.
    """
    number_at_least("context", context, 0)
    draws = whole_number("draws", draws)
    if not is_calm(model):
        body, head = _ends(model)
        return TokenCost(2.0 * matrix_weights(body), _attention(model.config, context + 1), 2.0 * head)
    patch = model.config.patch
    state = _state(model)
    drawn = counted(lambda: model.sample_chunks(state, draws))
    entries = context / patch + 1
    reading, attention = _reading(model), _attention(model.config.backbone, entries)
    return TokenCost(reading / patch, attention / patch, drawn / patch)


def training_cost(model: Any, length: int) -> TokenCost:
    """Operations of learning from a token of texts of ``length`` tokens; of a CALM without its autoencoder's training.

    Raises:
        UnsupportedModelError: the model has matrices that are no linear layers.
        ValueError: the length is no whole number of at least 1.
    """
    length = whole_number("length", length)
    if not is_calm(model):
        body, output = _ends(model)
        attention = BACKWARD * _attention(model.config, (length + 1) / 2)
        return TokenCost(2.0 * BACKWARD * matrix_weights(body), attention, 2.0 * BACKWARD * output)
    config = model.config
    chunk = torch.zeros(1, config.patch, dtype=torch.long, device=model.device)
    targets = torch.zeros(config.targets, 1, config.latent, device=model.device)
    head = counted(lambda: model.head.loss(_state(model), targets, many_targets=True))
    encoder = counted(lambda: model.autoencoder.encode(chunk))
    attention = _attention(config.backbone, (length / config.patch + 1) / 2)
    parts = (BACKWARD * _reading(model), BACKWARD * attention, BACKWARD * head, encoder)
    return TokenCost(*(part / config.patch for part in parts))


def autoencoder_training_cost(autoencoder: Any) -> float:
    """Operations of the autoencoder's training for each token that it sees, with the exact cross-entropy."""
    config = autoencoder.config
    chunk = torch.zeros(1, config.patch, dtype=torch.long, device=autoencoder.device)
    latent = torch.zeros(1, config.latent, device=autoencoder.device, dtype=autoencoder.dtype)
    once = counted(lambda: autoencoder.encode(chunk)) + counted(lambda: autoencoder.decode(latent))
    return BACKWARD * once / float(config.patch)


def counted(call: Callable[[], Any]) -> float:
    """Operations of the matrix products of a call, two for each weight; attention kernels of torch are not seen."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def matrix_weights(model: nn.Module) -> int:
    """Weights of all linear layers of a model through which every token goes.

    Raises:
        UnsupportedModelError: there are matrices of another kind, such as those of experts that few tokens go to.
    """
    known = (nn.Linear, Conv1D, nn.Embedding)
    for module in model.modules():
        odd = [name for name, p in module.named_parameters(recurse=False) if p.ndim > 1]
        if odd and not isinstance(module, known):
            raise UnsupportedModelError(
                f"operations can be counted of linear layers only, and {type(module).__name__} has {odd[0]} of its own"
            )
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)))


def _reading(model: Any) -> float:
    """Operations of a CALM for a chunk: the network that embeds it, and the backbone's matrices."""
    return 2.0 * (matrix_weights(model.backbone) + matrix_weights(model.embedding))


def _ends(model: Any) -> tuple[nn.Module, int]:
    """The body of a causal LM, and the weights of its output matrix."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UnsupportedModelError(f"model must be a causal language model with an output matrix, got {type(model)}")
    return model.base_model, head.weight.numel()


def _attention(config: Any, entries: float) -> float:
    """Operations of one position that attends to so many entries, in all layers."""
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    return 4.0 * entries * heads * size * int(config.num_hidden_layers)


def _state(model: Any) -> torch.Tensor:
    return torch.zeros(1, model.config.hidden_size, device=model.device, dtype=model.dtype)
