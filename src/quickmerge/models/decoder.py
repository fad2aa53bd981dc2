"""Finding the parts of a Hugging Face causal LM that the host acts on, or saying why it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.attachment import aside, stands_aside
from quickmerge.models.compat import attention_function, attention_implementation, make_mask, register_attention

FAMILIES = ("gemma3_text", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""``config.model_type`` of the families that the committed matrix (tests/merge/matrix.json) proves."""

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

    @property
    def alone(self) -> bool:
        """Whether the model is a language model, and not one of several parts."""
        return self.model.config is self.base.config

    @property
    def attention(self) -> str:
        """The attention implementation that the model runs, one of `IMPLEMENTATIONS`, whoever watches it."""
        return attention_implementation(self.config).removeprefix(PREFIX)


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


# Standing in front of a model's attention function, through transformers' attention registry.
#
# For each implementation we can serve, one function is registered under a name of our own ("quickmerge_sdpa"...).
# While a run is attached, the model's configuration names that function; it lets the run look at queries, keys and
# values, and then calls the very function that the model would have called. Nothing that exists is replaced.
#
# Two runs may stand in front of one module: one that decides which tokens there are, and behind it one that computes
# the attention over them (`Watcher.computes`).


AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class Watcher(Protocol):
    """What an attached run does with one call of attention.

    ``computes`` says that it takes the place of the model's function, and then reads ``key_size``, which
    `proportional_attention` hands on; ``shares`` that such a run may stand behind it. Both are False by default.
    ``beside`` is another watcher, of the same run, that may stand in front of the same modules.
    ``no_trees`` says why a model can't read draft trees behind a prompt while it watches; by default it can.
    """

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Return the attention output, usually ``call(module, *args, **kwargs)``."""
        ...


class Ours(str):
    """The name of one of our attention functions, which in a copy, or out of a pickle, is that of the one behind it."""

    def _behind(self) -> str:
        return self.removeprefix(PREFIX)

    def __copy__(self) -> str:
        return self._behind()

    def __deepcopy__(self, memo: Any) -> str:
        return self._behind()

    def __reduce_ex__(self, protocol: Any) -> tuple[type[str], tuple[str]]:
        return str, (self._behind(),)


_WATCHED: WeakKeyDictionary[nn.Module, tuple[tuple[Watcher, int], ...]] = WeakKeyDictionary()
"""For each module who watches it, and as which layer. The first is asked first."""


@dataclass(frozen=True)
class Watched:
    """An attention function with a watcher in front of it."""

    watcher: Watcher
    layer: int
    call: AttentionFunction

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """What the watcher makes of the call."""
        return self.watcher.attend(self.layer, self.call, module, args, kwargs)


_ALONE: ContextVar[Watcher | None] = ContextVar("quickmerge_alone", default=None)
"""The one watcher that is asked while all runs stand aside."""


@contextmanager
def only_asked(watcher: Watcher) -> Iterator[None]:
    """Within the block this thread's forwards are those of the plain model, but for ``watcher``, which is asked."""
    token = _ALONE.set(watcher)
    try:
        with aside():
            yield
    finally:
        _ALONE.reset(token)


def _front(implementation: str) -> AttentionFunction:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = attention_function(implementation, module)
        # A compiler of graphs can't look; what it makes is of the model as it is.
        alone = None if torch.compiler.is_compiling() else _ALONE.get()
        if alone is not None:
            for watcher, layer in _WATCHED.get(module, ()):
                if watcher is alone:
                    return watcher.attend(layer, call, module, args, kwargs)
        if stands_aside():
            return call(module, *args, **kwargs)
        for watcher, layer in reversed(_WATCHED.get(module, ())):
            call = Watched(watcher, layer, call)
        return call(module, *args, **kwargs)

    return attention


def computes(watcher: object) -> bool:
    """Whether a watcher takes the place of the attention function; see `Watcher`."""
    return bool(getattr(watcher, "computes", False))


def _together(one: object, other: object) -> bool:
    """Whether two watchers, or watchers of two classes, may stand in front of one module."""
    if getattr(one, "beside", None) is other or getattr(other, "beside", None) is one:
        return True
    if computes(one) == computes(other):
        return False
    return bool(getattr(other if computes(one) else one, "shares", False))


def watchers(model: nn.Module) -> tuple[str, ...]:
    """Names of the kinds of runs that watch the attention of a model, each once."""
    return tuple(sorted({type(w).__name__ for module in model.modules() for w, _ in _WATCHED.get(module, ())}))


def check_trees(model: nn.Module) -> None:
    """Raise UnsupportedModelError if a run is attached to ``model`` in which it reads no draft trees."""
    for module in model.modules():
        for watcher, _ in _WATCHED.get(module, ()):
            why = getattr(watcher, "no_trees", None)
            if why is not None:
                raise UnsupportedModelError(f"{type(model).__name__} can't read draft trees here: {why}")


def check_chains(model: nn.Module, why: str) -> None:
    """Raise UnsupportedModelError if a run is attached to ``model`` that changes which tokens there are.

    Args:
        model: one that reads one path of each draft, and puts back what its cache held.
        why: the trait for which it does.
    """
    for module in model.modules():
        for watcher, _ in _WATCHED.get(module, ()):
            if not computes(watcher):
                raise UnsupportedModelError(
                    f"{type(model).__name__} can't speculate while {type(watcher).__name__} is attached: it takes "
                    f"drafts back by what its cache held, not by columns, since {why}"
                )


def check_free(model: nn.Module, attentions: Sequence[nn.Module], watcher: Watcher | type[Watcher]) -> None:
    """Raise UnsupportedModelError if a run that doesn't share the attention with this one is attached to a module."""
    there = {id(other): other for module in attentions for other, _ in _WATCHED.get(module, ())}
    if not all(_together(watcher, other) for other in there.values()):
        both = any(computes(w) for w in (watcher, *there.values()))
        why = ", and only merging in prefix mode shares the attention with multipole attention" if both else ""
        raise UnsupportedModelError(f"{type(model).__name__} is already inside a quickmerge run{why}; leave it first")


def watch(decoder: Decoder, watcher: Watcher) -> Callable[[], None]:
    """Route the decoder's attention through ``watcher``; the returned function undoes it.

    Raises:
        UnsupportedModelError: if another run is attached already that doesn't share the attention with this one.
    """
    # Inside a model of several parts the decoder alone is told.
    holder: Any = decoder.model if decoder.alone else decoder.base
    return watch_modules(holder, decoder.attentions, watcher, decoder.config)


def watch_modules(
    model: PreTrainedModel, attentions: Sequence[nn.Module], watcher: Watcher, config: Any = None
) -> Callable[[], None]:
    """Route the attention of some modules of ``model`` through ``watcher``, the i-th as layer i.

    Args:
        model: what holds the modules and is told to use our function.
        attentions: the modules that call the attention function, in order.
        watcher: what is called.
        config: the configuration that names the attention function; default: the model's.

    Returns:
        A function that undoes it.

    Raises:
        UnsupportedModelError: if another run is attached already that doesn't share the attention with this one.
    """
    check_free(model, attentions, watcher)
    implementation = attention_implementation(model.config if config is None else config).removeprefix(PREFIX)
    for each in IMPLEMENTATIONS:
        register_attention(PREFIX + each, _front(each), like=each)
    model.set_attn_implementation(Ours(PREFIX + implementation))
    for layer, module in enumerate(attentions):
        others, own = _WATCHED.get(module, ()), ((watcher, layer),)
        _WATCHED[module] = others + own if computes(watcher) else own + others

    def undo() -> None:
        for module in attentions:
            left = tuple(pair for pair in _WATCHED.pop(module, ()) if pair[0] is not watcher)
            if left:
                _WATCHED[module] = left
        if not any(module in _WATCHED for module in attentions):
            model.set_attn_implementation(implementation)

    return undo


def proportional_attention(
    call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: Tensor
) -> Any:
    """Attention with log(size) added to the score of every key (ToMe, arXiv 2210.09461, eq. 1).

    One more channel holds ``1`` in the query and ``log(size) / scaling`` in the key, so any fused kernel does it
    without a bias matrix. ``args`` start with query, key and value; ``size (B, keys)``, or ``(B, G, keys)`` where key
    heads hold entries of their own, counts original tokens. A run that computes the attention itself gets the sizes as
    ``key_size`` in their place.
    """
    if isinstance(call, Watched) and computes(call.watcher):
        return call(module, *args, **kwargs, key_size=size)
    query, key, value = args[:3]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    precise = torch.promote_types(key.dtype, torch.float32)
    bias = (size.clamp_min(1).to(precise).log() / scaling).to(key.dtype)
    bias = bias[:, None] if bias.ndim == 2 else bias
    wide = (
        torch.cat([query, torch.ones_like(query[..., :1])], -1),
        torch.cat([key, bias[..., None].expand(*key.shape[:3], 1)], -1),
        torch.cat([value, torch.zeros_like(value[..., :1])], -1),
    )
    out, weights = call(module, *wide, *args[3:], **{**kwargs, "scaling": scaling})
    return out[..., :-1], weights


def decoder_mask(decoder: Decoder, **settings: Any) -> Any:
    """An attention mask as the decoder wants it; for ``settings`` see `quickmerge.models.compat.make_mask`."""
    return make_mask(decoder.attention, config=decoder.config, **settings)
