"""Finding the parts of a Hugging Face causal LM that the host acts on, or saying why it can't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import attention_implementation

FAMILIES = ("gemma3_text", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""``config.model_type`` of the families that the committed matrix (tests/hosts/matrix.json) proves."""

PREFIX = "quickmerge_"
"""How our names in transformers' attention registry begin."""

IMPLEMENTATIONS = ("eager", "sdpa")
"""Attention implementations the host can stand in front of."""


@dataclass(frozen=True)
class Decoder:
    """The base decoder of a causal LM: its blocks, their attention modules, and each block's sliding window."""

    model: PreTrainedModel
    base: nn.Module
    layers: nn.ModuleList
    attentions: tuple[nn.Module, ...]
    windows: tuple[int | None, ...]

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def config(self) -> Any:
        """The decoder's own configuration."""
        return self.base.config


def find_decoder(model: PreTrainedModel, shared: bool = False) -> Decoder:
    """Find the decoder blocks of ``model`` by structure.

    Args:
        model: a causal language model.
        shared: whether it may be inside a run already, whose attention another one may share.

    Raises:
        UnsupportedModelError: naming the class and what was looked for, if the family is not one of `FAMILIES`,
            the blocks or their attention can't be found, or the attention implementation is not one of
            `IMPLEMENTATIONS`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name, base = type(model).__name__, model.base_model
    kind = getattr(base.config, "model_type", None)
    if base is model or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head on a base decoder, which merging needs")
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} (model_type {kind!r}) is not supported: merging is proven for {', '.join(FAMILIES)}"
        )
    return read_decoder(model, base, shared)


def read_decoder(model: PreTrainedModel, base: Any, shared: bool = False) -> Decoder:
    """The parts of the decoder ``base`` of ``model``; for ``shared`` see `find_decoder`.

    Raises:
        UnsupportedModelError: see `find_decoder`.
    """
    name = type(model).__name__
    stacks = [m for m in base.children() if isinstance(m, nn.ModuleList) and len(m) == base.config.num_hidden_layers]
    if len(stacks) != 1:
        raise UnsupportedModelError(f"{name} has {len(stacks)} lists of decoder blocks, exactly one was looked for")
    layers = stacks[0]
    attentions = []
    for block in layers:
        found = [m for m in block.children() if hasattr(m, "layer_idx")]
        if len(found) != 1:
            raise UnsupportedModelError(f"{name} has a block with {len(found)} attention modules, one was looked for")
        attentions.append(found[0])
    check_attention(name, base.config, shared)
    windows = tuple(layer_window(base.config, i) for i in range(len(layers)))
    return Decoder(model, base, layers, tuple(attentions), windows)


def check_attention(name: str, config: Any, shared: bool = False) -> None:
    """Raise UnsupportedModelError unless the host can stand in front of the attention that ``config`` names."""
    implementation = attention_implementation(config)
    if shared:
        implementation = implementation.removeprefix(PREFIX)
    if implementation.startswith(PREFIX):
        raise UnsupportedModelError(f"{name} is already inside a quickmerge run; leave that first")
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attention as {implementation!r}, which merging can't stand in front of: "
            f"load it with attn_implementation set to one of {', '.join(IMPLEMENTATIONS)}"
        )


def layer_window(config: Any, layer: int) -> int | None:
    """The sliding window of a block in positions, None for full attention.

    Raises:
        UnsupportedModelError: for a block type that is neither full nor sliding attention.
    """
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        return window
    if types[layer] == "full_attention":
        return None
    if types[layer] == "sliding_attention":
        return window
    raise UnsupportedModelError(
        f"{config.model_type} block {layer} is of type {types[layer]!r}; "
        "full_attention and sliding_attention are allowed"
    )
