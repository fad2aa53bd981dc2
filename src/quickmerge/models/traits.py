"""What a decoder block is: how it mixes tokens, what it keeps of them, and what stands in the way of a capability.

Traits are read from what a block is made of and from what its configuration declares of it, never from a family's name.
A capability says which traits it can't serve by `Decoder.need`; the error then names the block and the trait.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from quickmerge.models.compat import asks_registry

FULL, SLIDING, CHUNKED, INDEXED, SPARSE, COMPRESSED = (
    "full", "sliding", "chunked", "indexed", "block-sparse", "compressed",
)  # fmt: skip
"""Kinds of attention: to all tokens before, to those in a window, to those of the same chunk, to those that an indexer
picks for each query, to blocks of keys that it picks, to entries that each stand for several tokens."""

LINEAR, STATE_SPACE, CONVOLUTION = "linear attention", "a state space", "a convolution"
"""Kinds of memory of a fixed size that a block may read tokens into, one after the other."""

_DECLARED: dict[str, tuple[str | None, str | None]] = {
    "full_attention": (FULL, None),
    "attention": (FULL, None),
    "global": (FULL, None),
    "sliding_attention": (SLIDING, None),
    "local": (SLIDING, None),
    "chunked_attention": (CHUNKED, None),
    "indexed_attention": (INDEXED, None),
    "deepseek_sparse_attention": (INDEXED, None),
    "qwen_sparse_attention": (INDEXED, None),
    "minimax_m3_sparse": (SPARSE, None),
    "compressed_sparse_attention": (COMPRESSED, None),
    "heavily_compressed_attention": (COMPRESSED, None),
    "linear_attention": (None, LINEAR),
    "mamba": (None, STATE_SPACE),
    "recurrent": (None, STATE_SPACE),
    "conv": (None, CONVOLUTION),
    "hybrid": (FULL, LINEAR),
    "hybrid_sliding": (SLIDING, LINEAR),
    "moe": (None, None),
    "mlp": (None, None),
}
"""The attention and the memory of a block by its declared type."""

_WINDOWS = ("sliding_window", "sliding_window_size", "attention_window_size", "window_size")
_STREAMS = ("altup_num_inputs", "hc_mult", "hc_count")
_BIASES = ("alibi", "position_bias", "relative_distance")
_SHARED = ("is_kv_shared_layer", "kv_shared_layer_index", "store_full_length_kv")


@dataclass(frozen=True)
class BlockTraits:
    """What one decoder block is.

    Attributes:
        declared: the type that the configuration gives the block; inferred where it gives none.
        attention: one of `FULL`, `SLIDING`, `CHUNKED`, `INDEXED`, `SPARSE`, `COMPRESSED`, or None for none.
        memory: one of `LINEAR`, `STATE_SPACE`, `CONVOLUTION`, where the block reads tokens into a memory of fixed size,
            beside attention or instead of it; else None.
        window: how many positions sliding attention sees, or how many a chunk has; None for full attention.
        registered: whether the attention is computed by a function of transformers' registry, so that queries, keys and
            values can be seen.
        tied: whether other blocks run the same attention module.
        entries: the layer of the cache whose keys and values its attention reads; None without attention.
        shares: whether another block made those keys and values.
        lends: whether other blocks read the keys and values that it makes.
        picks: whether it has an indexer of its own, and does not go by what that of another block chose.
        latent: whether keys and values are made of one latent vector (MLA), so that keys are wider than values.
        sinks: whether its heads have sinks, a learned logit that takes part in every softmax.
        softcap: the bound of its attention logits, or None.
        parallel: whether attention and feed-forward part read the same hidden states and are added together.
        positions: what tells it of positions: ``"rotary"``, ``"learned"`` embeddings at the bottom, ``"bias"`` on the
            attention logits (ALiBi and relative biases), or ``"none"``.
        streams: how many hidden streams run through it side by side.
        per_layer_input: whether it is given an embedding of every token of its own.
        further: whether it takes further keyword arguments and hands them on to its attention.
    """

    declared: str
    attention: str | None = FULL
    memory: str | None = None
    window: int | None = None
    registered: bool = True
    tied: bool = False
    entries: int | None = None
    shares: bool = False
    lends: bool = False
    picks: bool = False
    latent: bool = False
    sinks: bool = False
    softcap: float | None = None
    parallel: bool = False
    positions: str = "rotary"
    streams: int = 1
    per_layer_input: bool = False
    further: bool = True

    @property
    def owns(self) -> bool:
        """Whether it writes keys and values of its own into the cache."""
        return self.attention is not None and not self.shares

    @property
    def plain(self) -> bool:
        """Whether it is full or sliding attention over keys and values of its own, and nothing else."""
        return self.attention in (FULL, SLIDING) and self.memory is None and not self.shares and self.registered


def not_plain(block: BlockTraits) -> str | None:
    """What keeps a block from being plain full or sliding attention, for `Decoder.need`; None if nothing does."""
    if block.attention is None:
        return f"{block.memory} in place of attention" if block.memory else "no attention"
    if block.memory is not None:
        return f"{block.memory} beside its attention"
    if block.attention not in (FULL, SLIDING):
        return f"{block.attention} attention"
    if block.shares:
        return "the keys and values of another block"
    return None if block.registered else "attention that asks no function of transformers' registry"


def attention_of(block: nn.Module) -> nn.Module | None:
    """The self-attention module inside of a block; None for a block without one, or with one that can't be told.

    It is the module whose ``forward`` asks transformers' attention registry. Where several do, as where attention runs
    over the residuals of blocks too, it is the one that knows its layer in the cache.
    """
    found = [module for module in block.modules() if asks_registry(module)]
    found = [m for m in found if hasattr(m, "layer_idx")] if len(found) != 1 else found
    return found[0] if len(found) == 1 else None


def declared_type(config: Any, layer: int) -> str:
    """The declared type of a block; where there is none, what transformers takes it for, by window and chunk."""
    for name in ("layer_types", "layers_block_type", "attention_layers"):
        types = getattr(config, name, None)
        if isinstance(types, (list, tuple)) and layer < len(types):
            # Some say only that a block has attention, and how far it sees elsewhere.
            narrow = types[layer] == "attention" and getattr(config, "attention_window_size", None)
            return "sliding_attention" if narrow else str(types[layer])
    own = _own(config, layer)
    if getattr(own, "sliding_window", None) is not None:
        return "sliding_attention"
    return "full_attention" if getattr(own, "attention_chunk_size", None) is None else "chunked_attention"


def window_of(config: Any, layer: int) -> int | None:
    """How far a block's attention sees in positions, or how long its chunks are; None for all."""
    attention = _DECLARED.get(declared_type(config, layer), (None, None))[0]
    own = _own(config, layer)
    if attention == CHUNKED:
        return int(own.attention_chunk_size)
    if attention != SLIDING:
        return None
    return next((int(size) for name in _WINDOWS if (size := getattr(own, name, None))), None)


def block_traits(
    base: nn.Module, layers: nn.ModuleList, attentions: tuple[nn.Module | None, ...]
) -> Iterator[BlockTraits]:
    """The traits of each block of the decoder ``base``, from the bottom up."""
    config: Any = base.config
    shared = getattr(config, "kv_sharing_modes", None) or [None] * len(layers)
    makers: dict[str, int] = {}
    lent = {i for i, module in enumerate(attentions) if shared[i] == "store" or getattr(module, _SHARED[2], False)}
    lent |= {borrowed for module in attentions if (borrowed := _borrowed(module)) is not None}
    for i, (block, module) in enumerate(zip(layers, attentions, strict=True)):
        declared = declared_type(config, i)
        attention, memory = _DECLARED.get(declared, (declared, None))
        if memory == LINEAR and _holds(block, "mamba", "ssm"):
            memory = STATE_SPACE
        indexer = getattr(module, "indexer", None)
        if attention == INDEXED and getattr(indexer, "compress_ratio", 1) > 1:
            attention = SPARSE
        if memory is None and attention is not None and module is None and _holds(block, "mamba", "mixer", "rwkv"):
            attention, memory = None, STATE_SPACE
        entries = getattr(module, "layer_idx", None) if attention is not None else None
        shares = shared[i] == "reuse" or bool(getattr(module, _SHARED[0], False))
        if shares:
            borrowed = _borrowed(module)
            entries = makers.get(declared) if borrowed is None else borrowed
        elif entries is not None:
            makers[declared] = entries
        yield BlockTraits(
            declared=declared,
            attention=attention,
            memory=memory,
            window=window_of(config, i),
            registered=attention is None or module is not None,
            tied=module is not None and sum(each is module for each in attentions) > 1,
            entries=entries,
            shares=shares,
            lends=i in lent,
            picks=isinstance(indexer, nn.Module),
            latent=getattr(module, "kv_lora_rank", None) is not None,
            sinks=module is not None and any("sink" in name for name, _ in module.named_parameters()),
            softcap=_softcap(module),
            parallel=_parallel(block, config),
            positions=_positions(base, block),
            streams=max([1, *(int(getattr(config, name, None) or 1) for name in _STREAMS)]),
            per_layer_input="per_layer_input" in inspect.signature(block.forward).parameters,
            further=_takes_further(block) and (module is None or _takes_further(module)),
        )


def _own(config: Any, layer: int) -> Any:
    """The configuration of one block, where blocks of one model differ."""
    each = getattr(config, "per_layer_config", None)
    return config if each is None else each[layer]


def _borrowed(module: nn.Module | None) -> int | None:
    """The block whose keys and values a module reads, where it says so."""
    if module is None or not getattr(module, _SHARED[0], False):
        return None
    index: int | None = getattr(module, _SHARED[1], None)
    return index


def _holds(block: nn.Module, *names: str) -> bool:
    """Whether a module inside of a block is of a class with one of these in its name."""
    return any(name in type(module).__name__.lower() for module in block.modules() for name in names)


def _softcap(module: nn.Module | None) -> float | None:
    found = [value for name, value in vars(module).items() if "softcap" in name] if module is not None else []
    return next((float(value) for value in found if isinstance(value, (int, float)) and value), None)


def _parallel(block: nn.Module, config: Any) -> bool:
    told = getattr(config, "use_parallel_residual", getattr(config, "parallel_attn", None))
    norms = [name for name, _ in block.named_children() if "norm" in name or name.startswith("ln_")]
    parts = sum(1 for name, _ in block.named_children() if "attn" in name or "attention" in name or "mlp" in name)
    return bool(told) if told is not None else len(norms) == 1 and parts == 2


def _positions(base: nn.Module, block: nn.Module) -> str:
    takes = inspect.signature(block.forward).parameters
    if any(name in takes for name in _BIASES):
        return "bias" if getattr(base.config, "alibi", True) else "rotary"
    if _holds(block, "relative"):
        return "bias"
    if "position_embeddings" in takes or any("rotary" in name for name, _ in base.named_modules()):
        return "rotary"
    tables = [name for name, m in base.named_children() if isinstance(m, nn.Embedding) or "embed" in name]
    return "learned" if any("pos" in name or name == "wpe" for name in tables) else "none"


def _takes_further(module: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(module.forward).parameters.values())
