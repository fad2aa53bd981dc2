"""Vision transformers of transformers with fewer tokens, through module hooks and its attention registry."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.hosts.attachment import refuse_tracing
from quickmerge.hosts.attention import AttentionFunction, watch_modules
from quickmerge.hosts.encoder import Encoder, find_encoder, pixels_of
from quickmerge.hosts.level import full_length, pick, rotary, spread
from quickmerge.hosts.vision_run import Call, schedule_for
from quickmerge.hosts.vision_run import VisionRun as VisionRun
from quickmerge.reducers.base import Reducer
from quickmerge.tokens.removal import Removal
from quickmerge.tokens.saliency import AttentionTrace

CALL = "quickmerge_call"
"""Keyword by which a forward hands its state to its blocks, and a block to its attention."""


def reduce_vit(
    model: PreTrainedModel,
    reducer: Reducer,
    layer: int | Sequence[int] | Removal | None = None,
    *,
    unmerge: bool = False,
) -> VisionRun:
    """Make a vision transformer of transformers read with fewer tokens; see `quickmerge.hosts.reduce`."""
    encoder = find_encoder(model)
    return TransformersRun(encoder, reducer, schedule_for(encoder, reducer, layer), unmerge=unmerge)


class TransformersRun(VisionRun):
    """A run on a model of transformers."""

    def __init__(
        self, encoder: Encoder, reducer: Reducer, schedule: Removal | tuple[int, ...] | None, *, unmerge: bool = False
    ) -> None:
        super().__init__(encoder, reducer, schedule, unmerge=unmerge)
        self._signature = inspect.signature(encoder.base.forward)
        self._takes_keywords = any(p.kind is p.VAR_KEYWORD for p in self._signature.parameters.values())

    def _attach(self) -> None:
        encoder = self.encoder
        self._undo.append(watch_modules(encoder.base, [block.attention for block in encoder.blocks], self))
        self._note(encoder.base.register_forward_pre_hook(self._before_model, with_kwargs=True))
        self._note(encoder.base.register_forward_hook(self._after_model))
        embeddings: Any = encoder.base.embeddings
        self._note(embeddings.register_forward_pre_hook(self._before_embeddings, with_kwargs=True))
        if encoder.pooler is not None:
            self._note(encoder.pooler.register_forward_pre_hook(self._before_pooler))
        for index, block in enumerate(encoder.blocks):
            before = partial(self._before_block, index)
            self._note(block.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._note(block.attention.register_forward_pre_hook(self._before_attention, with_kwargs=True))
            self._hook_second_half(index, block)

    # One forward ------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_tracing(self._name)
        pixels = pixels_of(args, kwargs)
        masked = self._signature.bind_partial(*args, **kwargs).arguments.get("bool_masked_pos")
        if masked is not None:
            raise QuickmergeError("bool_masked_pos must be None inside a quickmerge run, got a mask")
        self.call = self._active = Call(self.encoder.grid(pixels))
        if self._takes_keywords:
            kwargs = {**kwargs, CALL: self.call}
        return args, kwargs

    def _before_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiler may take the hooks of the model itself as a function apart: here it is inside of the forward.
        self.encoder.grid(pixels_of(args, kwargs))

    def _before_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        call: Call = kwargs.get(CALL) or self._current()
        kwargs[CALL] = self._active = call
        if args:
            args = (self._enter_block(call, index, args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = self._enter_block(call, index, kwargs["hidden_states"])
        level = call.levels[index]
        if level is not None and kwargs.get("interpolate_pos_encoding") and _has_relative_bias(module):
            raise QuickmergeError(
                "interpolate_pos_encoding must be False inside a quickmerge run of a model with relative positions"
            )
        if level is not None and kwargs.get("position_embeddings") is not None:
            kwargs["position_embeddings"] = rotary(kwargs["position_embeddings"], level, call.prefix)
        return args, kwargs

    def _before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # With gradient checkpointing a block's inside runs again in the backward pass, when other forwards may have
        # begun: the keyword tells which one it belongs to.
        kwargs = dict(kwargs)
        self._active = kwargs.pop(CALL, None) or self._active
        return args, kwargs

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Called for every attention: keeps what a reducer reads, and adds log(size) to the scores."""
        state = self._current()
        level = state.levels[layer]
        query, key, value = args[:3]
        mask = args[3] if len(args) > 3 else kwargs.pop("attention_mask", None)
        bias = None
        if level is not None:
            bias = level.bias
            if mask is not None and mask.shape[-1] != key.shape[2]:
                mask = pick(mask, level)
            mask = bias if mask is None else mask if bias is None else mask + bias
        if state.targets[layer] is not None and not self.reducer.before:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            state.traces[layer] = AttentionTrace(query, key, value, scaling)
        return call(module, query, key, value, mask, *args[4:], **kwargs)

    # Handing out ------------------------------------------------------------------------------------------------

    def _before_pooler(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        call = self._current()
        return None if call.last is None else (spread(args[0], call.last, call.prefix), *args[1:])

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._current()
        level = call.last
        if level is None:
            return output
        if self.unmerge:
            output.last_hidden_state = full_length(output.last_hidden_state, level)
        elif self.encoder.model is not self.encoder.base:
            output.last_hidden_state = spread(output.last_hidden_state, level, call.prefix)
        return output


def _has_relative_bias(block: nn.Module) -> bool:
    return getattr(block, "relative_position_bias", None) is not None
