"""Finding the parts of a Hugging Face causal LM that the host acts on, or saying why it can't."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
from quickmerge.models.compat import (
    asks_registry,
    attention_function,
    attention_implementation,
    keeps_past,
    make_mask,
    register_attention,
)
from quickmerge.models.traits import SLIDING, BlockTraits, attention_of, block_traits, declared_type, window_of

FAMILIES = ("gemma3_text", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3")
"""``config.model_type`` of families that the committed matrix (tests/merge/matrix.json) goes through cell by cell."""

_BOTH = "{} reads text in both directions, as encoders do ({} is not causal), a decoder was looked for"

CHOSEN = "indices"
"""Keyword by which a model hands the keys that an indexer chose to an attention function that can read them so."""

PREFIX = "quickmerge_"
"""How our names in transformers' attention registry begin."""

IMPLEMENTATIONS = ("eager", "sdpa")
"""Attention implementations the host can stand in front of."""


@dataclass(frozen=True)
class Decoder:
    """The base decoder of a causal LM: its blocks, and what each of them is.

    Attributes:
        model: the language model, with its head.
        base: the decoder in it.
        layers: its blocks.
        attentions: the self-attention module of each block; None for a block without attention, or with one that asks
            no function of transformers' registry.
        windows: the sliding window of each block in positions; None for every other kind of block, see ``traits``.
        traits: what each block is.
    """

    model: PreTrainedModel
    base: nn.Module
    layers: nn.ModuleList
    attentions: tuple[nn.Module | None, ...]
    windows: tuple[int | None, ...]
    traits: tuple[BlockTraits, ...]

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

    @property
    def attending(self) -> tuple[int, ...]:
        """The blocks with attention that can be watched, from the bottom up."""
        return tuple(i for i, module in enumerate(self.attentions) if module is not None)

    def attention_in(self, layer: int) -> nn.Module:
        """The attention module of a block.

        Raises:
            UnsupportedModelError: if it has none that can be watched.
        """
        module = self.attentions[layer]
        if module is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has no attention in block {layer} ({self.traits[layer].declared}) that "
                "asks a function of transformers' registry, one was looked for"
            )
        return module

    def below(self, layer: int, count: int) -> tuple[int, ...]:
        """The nearest ``count`` blocks with attention below a block, from the bottom up; fewer where there are fewer.

        Blocks that borrow the keys and values of others have no statistics of their own and don't count.
        """
        if count <= 0:
            return ()
        return tuple(i for i in self.attending if i < layer and not self.traits[i].shares)[-count:]

    def need(self, what: str, lacks: Callable[[BlockTraits], str | None], blocks: Iterable[int] | None = None) -> None:
        """Refuse a model for the traits of its blocks.

        Args:
            what: that can't be, as in ``"multipole attention"``.
            lacks: the trait of a block that is the reason, in words that go behind "has"; None where it will do.
            blocks: that are asked; default: all.

        Raises:
            UnsupportedModelError: naming the model, the block and the trait.
        """
        for i in range(len(self)) if blocks is None else blocks:
            why = lacks(self.traits[i])
            if why is not None:
                raise UnsupportedModelError(
                    f"{what} can't be served for {type(self.model).__name__}, whose block {i} "
                    f"({self.traits[i].declared}) has {why}"
                )


def find_decoder(model: PreTrainedModel, shared: bool = False) -> Decoder:
    """Find the decoder blocks of ``model`` by structure.

    Args:
        model: a causal language model.
        shared: whether it may be inside a run already, whose attention another one may share.

    Raises:
        UnsupportedModelError: naming the class and what was looked for, if the model is no causal language model, its
            blocks or their attention can't be found, or the attention implementation is not one of `IMPLEMENTATIONS`.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name, base = type(model).__name__, _base_of(model)
    if base is None or not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head on a base decoder, which merging needs")
    return read_decoder(model, base, shared)


def _base_of(model: PreTrainedModel) -> Any:
    """The decoder inside of a language model: what holds a list of blocks; else the base model, or None."""
    inner = [m for m in (model.base_model, model.get_decoder(), *model.children()) if isinstance(m, PreTrainedModel)]
    inner = [m for m in inner if m is not model]
    return next((m for m in inner if _stacks(m)), next(iter(inner), None))


def _stacks(base: Any) -> list[nn.ModuleList]:
    """The lists of as many modules as the decoder ``base`` has blocks."""
    depth = getattr(base.config, "num_hidden_layers", None)
    return [m for m in base.children() if isinstance(m, nn.ModuleList) and len(m) == depth]


def read_decoder(model: PreTrainedModel, base: Any, shared: bool = False, *, both_ways: bool = False) -> Decoder:
    """The parts of the decoder ``base`` of ``model``; for ``shared`` see `find_decoder`.

    With ``both_ways`` it may let tokens see later ones, by masks that are made for it.

    Raises:
        UnsupportedModelError: see `find_decoder`.
    """
    name, config = type(model).__name__, base.config
    stacks = _stacks(base)
    if len(stacks) != 1:
        asking = [m for m in base.modules() if asks_registry(m)]
        if any(getattr(m, "is_causal", True) is False for m in asking):
            raise UnsupportedModelError(_BOTH.format(name, type(base).__name__))
        depth = getattr(config, "num_hidden_layers", None)
        raise UnsupportedModelError(
            f"{name} has {len(stacks)} lists of decoder blocks, exactly one was looked for, of "
            f"num_hidden_layers={depth} modules: {_instead(base)}"
        )
    layers = stacks[0]
    for i, block in enumerate(layers):
        asking = [m for m in block.modules() if asks_registry(m) and hasattr(m, "layer_idx")]
        if len(asking) > 1:
            raise UnsupportedModelError(
                f"{name} has {len(asking)} attention modules in block {i} "
                f"({', '.join(type(m).__name__ for m in asking)}), one at most was looked for: attention to an encoder "
                "and blocks of several attentions can't be served"
            )
    attentions = tuple(attention_of(block) for block in layers)
    both = [m for m in attentions if m is not None and getattr(m, "is_causal", True) is False]
    if both and not both_ways:
        raise UnsupportedModelError(_BOTH.format(name, type(both[0]).__name__))
    if not any(attentions):
        kinds = sorted({str(t.attention or t.memory) for t in block_traits(base, layers, attentions)})
        raise UnsupportedModelError(
            f"{name} has no block whose attention asks a function of transformers' registry, one at least was looked "
            f"for, as merging goes by queries and keys: its blocks are of {', '.join(kinds)}"
        )
    if keeps_past(base):
        raise UnsupportedModelError(f"{name} keeps what it has read in modules of its own, a cache was looked for")
    check_attention(name, config, shared)
    traits = tuple(block_traits(base, layers, attentions))
    windows = tuple(t.window if t.attention == SLIDING else None for t in traits)
    return Decoder(model, base, layers, attentions, windows, traits)


def _instead(base: nn.Module) -> str:
    """What there is where no list of decoder blocks was found, in words."""
    lists = [n for n, m in base.named_modules() if isinstance(m, nn.ModuleList)]
    return f"its lists of modules are {', '.join(lists[:4])}" if lists else "it holds no list of modules"


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
    declared = declared_type(config, layer)
    if declared not in ("full_attention", "sliding_attention"):
        raise UnsupportedModelError(
            f"{config.model_type} block {layer} is of type {declared!r}; "
            "full_attention and sliding_attention are allowed"
        )
    return window_of(config, layer)


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
        if kwargs.get(CHOSEN) is not None:
            # Under the plain implementation's name the model itself puts what its indexer chose into the mask.
            mask = args[3] if len(args) > 3 else kwargs.pop("attention_mask")
            args = (*args[:3], _only_chosen(mask, kwargs[CHOSEN], args[0], args[1]), *args[4:])
            kwargs[CHOSEN] = None
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


def _only_chosen(mask: Tensor, chosen: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The mask ``(B, 1, q, n)``, without the keys that are not among ``chosen (B, q, k)`` of their query."""
    hidden = torch.ones(*chosen.shape[:2], key.shape[2], dtype=torch.bool, device=chosen.device)
    hidden = hidden.scatter(-1, chosen.long(), False)[:, None]
    return mask & ~hidden if mask.dtype == torch.bool else mask.masked_fill(hidden, torch.finfo(query.dtype).min)


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


def check_free(model: nn.Module, attentions: Sequence[nn.Module | None], watcher: Watcher | type[Watcher]) -> None:
    """Raise UnsupportedModelError if a run that doesn't share the attention with this one is attached to a module."""
    there = {id(other): other for module in attentions if module is not None for other, _ in _WATCHED.get(module, ())}
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
    model: PreTrainedModel, attentions: Sequence[nn.Module | None], watcher: Watcher, config: Any = None
) -> Callable[[], None]:
    """Route the attention of some modules of ``model`` through ``watcher``, the i-th as layer i.

    Args:
        model: what holds the modules and is told to use our function.
        attentions: the modules that call the attention function, in order; None for a layer that calls none.
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
        if module is None:
            continue
        others, own = _WATCHED.get(module, ()), ((watcher, layer),)
        _WATCHED[module] = others + own if computes(watcher) else own + others

    def undo() -> None:
        for module in filter(None, attentions):
            left = tuple(pair for pair in _WATCHED.pop(module, ()) if pair[0] is not watcher)
            if left:
                _WATCHED[module] = left
        if not any(module in _WATCHED for module in filter(None, attentions)):
            model.set_attn_implementation(implementation)

    return undo


def proportional_attention(
    call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: Tensor
) -> Any:
    """Attention with log(size) added to the score of every key (ToMe, arXiv 2210.09461, eq. 1).

    For one new token, or where scores are bounded, that is one row more to the mask. For several it would be a matrix:
    then one more channel holds ``1`` in the query and ``log(size) / scaling`` in the key, so any fused kernel does it
    without one. Keys and values are copied for that, which a single token should not wait for.

    ``args`` start with query, key and value; ``size (B, keys)``, or ``(B, G, keys)`` where key heads hold entries of
    their own, counts original tokens. A run that computes the attention itself gets the sizes as ``key_size`` instead.
    """
    if isinstance(call, Watched) and computes(call.watcher):
        return call(module, *args, **kwargs, key_size=size)
    query, key, value = args[:3]
    if kwargs.get("softcap") is not None or (query.shape[2] == 1 and size.ndim == 2):
        # What bounds the scores would bound the sizes with them, too, if they weren't in the mask, which comes behind.
        masked = _with_sizes(kwargs.get("attention_mask") if len(args) < 4 else args[3], query, size)
        rest = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        return call(module, query, key, value, masked, *args[4:], **rest)
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
    return out[..., :-1].contiguous(), weights


def _with_sizes(mask: Tensor | None, query: Tensor, size: Tensor) -> Tensor:
    """``mask``, ``(B or 1, 1, q, n)`` or None for causal order, with log(size) added as scores are."""
    q, n = query.shape[2], size.shape[-1]
    if mask is None:
        mask = torch.ones(q, n, dtype=torch.bool, device=query.device).tril(n - q)[None, None]
    if mask.dtype == torch.bool:
        mask = query.new_zeros(()).where(mask, torch.finfo(query.dtype).min)
    bias = size.clamp_min(1).to(torch.promote_types(mask.dtype, torch.float32)).log().to(mask.dtype)
    # As many heads of queries go by a key head's own sizes as go by its keys.
    bias = bias[:, None] if bias.ndim == 2 else bias.repeat_interleave(query.shape[1] // bias.shape[1], 1)
    return mask[..., :n] + bias[:, :, None]


def decoder_mask(decoder: Decoder, **settings: Any) -> Any:
    """An attention mask as the decoder wants it; for ``settings`` see `quickmerge.models.compat.make_mask`."""
    return make_mask(decoder.attention, config=decoder.config, **settings)
