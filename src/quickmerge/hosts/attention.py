"""Standing in front of a model's attention function, through transformers' attention registry.

For each implementation we can serve, one function is registered under a name of our own ("quickmerge_sdpa"...).
While a run is attached, the model's configuration names that function; it lets the run look at queries, keys and
values, and then calls the very function that the model would have called. Nothing that exists is replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from quickmerge.errors import UnsupportedModelError
from quickmerge.hosts.structure import IMPLEMENTATIONS, PREFIX, Decoder

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]


class Watcher(Protocol):
    """What an attached run does with one call of attention."""

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Return the attention output, usually ``call(module, *args, **kwargs)``."""
        ...


_WATCHED: WeakKeyDictionary[nn.Module, tuple[Watcher, int]] = WeakKeyDictionary()


def base_function(implementation: str, module: nn.Module) -> AttentionFunction:
    """The attention function that transformers itself would use for this module."""
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]  # type: ignore[no-any-return]
    # Eager is not in the registry: every modeling file has its own.
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager_attention_forward beside it; use sdpa")
    return function  # type: ignore[no-any-return]


def _front(implementation: str) -> AttentionFunction:
    def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        call = base_function(implementation, module)
        watched = _WATCHED.get(module)
        if watched is None:
            return call(module, *args, **kwargs)
        watcher, layer = watched
        return watcher.attend(layer, call, module, args, kwargs)

    return attention


def watch(decoder: Decoder, watcher: Watcher) -> Callable[[], None]:
    """Route the decoder's attention through ``watcher``; the returned function undoes it.

    Raises:
        UnsupportedModelError: if another run is attached already.
    """
    # Inside a model of several parts the decoder alone is told.
    holder: Any = decoder.model if decoder.model.config is decoder.config else decoder.base
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
        UnsupportedModelError: if another run is attached already.
    """
    if any(module in _WATCHED for module in attentions):
        raise UnsupportedModelError(f"{type(model).__name__} is already inside a quickmerge run; leave it first")
    implementation = (model.config if config is None else config)._attn_implementation
    name = PREFIX + implementation
    if name not in ALL_ATTENTION_FUNCTIONS:
        for each in IMPLEMENTATIONS:
            AttentionInterface.register(PREFIX + each, _front(each))
            AttentionMaskInterface.register(PREFIX + each, ALL_MASK_ATTENTION_FUNCTIONS[each])
    model.set_attn_implementation(name)
    for layer, module in enumerate(attentions):
        _WATCHED[module] = (watcher, layer)

    def undo() -> None:
        for module in attentions:
            _WATCHED.pop(module, None)
        model.set_attn_implementation(implementation)

    return undo


def proportional_attention(
    call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: Tensor
) -> Any:
    """Attention with log(size) added to the score of every key (ToMe, arXiv 2210.09461, eq. 1).

    One more channel holds ``1`` in the query and ``log(size) / scaling`` in the key, so any fused kernel does it
    without a bias matrix. ``args`` start with query, key and value; ``size (B, keys)`` counts original tokens.
    """
    query, key, value = args[:3]
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    precise = torch.promote_types(key.dtype, torch.float32)
    bias = (size.clamp_min(1).to(precise).log() / scaling).to(key.dtype)
    wide = (
        torch.cat([query, torch.ones_like(query[..., :1])], -1),
        torch.cat([key, bias[:, None, :, None].expand(*key.shape[:3], 1)], -1),
        torch.cat([value, torch.zeros_like(value[..., :1])], -1),
    )
    out, weights = call(module, *wide, *args[3:], **{**kwargs, "scaling": scaling})
    return out[..., :-1], weights


def mask_function(decoder: Decoder) -> Callable[..., Any]:
    """The mask builder registered for the decoder's attention implementation."""
    name = decoder.config._attn_implementation.removeprefix(PREFIX)
    return ALL_MASK_ATTENTION_FUNCTIONS[name]  # type: ignore[no-any-return]
