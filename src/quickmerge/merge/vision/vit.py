"""Vision transformers of transformers with fewer tokens, through module hooks and its attention registry."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.plan import follow, to_members
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.view import Evidence, TokenView
from quickmerge.merge.vision.run import (
    Call,
    Level,
    as_bias,
    first_members,
    full_length,
    pick,
    schedule_for,
    spread,
    tokens_of,
    unless_aside,
    with_tokens,
)
from quickmerge.merge.vision.run import VisionRun as VisionRun
from quickmerge.models.attachment import refuse_tracing
from quickmerge.models.compat import replays_hooks
from quickmerge.models.decoder import AttentionFunction, watch_modules
from quickmerge.models.encoder import Encoder, find_encoder, pixels_of
from quickmerge.models.encoder_places import Layout, at_places
from quickmerge.models.encoder_probe import first_argument, where_told

CALL = "quickmerge_call"
"""Keyword by which a forward hands its state to its blocks, and a block to its attention."""

MASKS = ("pixel_attention_mask", "patch_attention_mask")
"""Arguments that say which patches are there, ``(B, N)`` or ``(B, H, W)``."""

GRIDDED = ("grid", "pool")
"""Methods that go by where patches lie beside one another."""


def reduce_vit(
    model: PreTrainedModel,
    reducer: Reducer,
    layer: int | Sequence[int] | Removal | None = None,
    *,
    unmerge: bool = False,
) -> VisionRun:
    """Make a vision transformer of transformers read with fewer tokens; see `quickmerge.merge.attach.reduce`."""
    encoder = find_encoder(model)
    return TransformersRun(encoder, reducer, schedule_for(encoder, reducer, layer), unmerge=unmerge)


class TransformersRun(VisionRun):
    """A run on a model of transformers.

    ``gives_whole`` says that parts behind the blocks that read patches together get all of them.
    """

    gives_whole = True

    def __init__(
        self, encoder: Encoder, reducer: Reducer, schedule: Removal | tuple[int, ...] | None, *, unmerge: bool = False
    ) -> None:
        super().__init__(encoder, reducer, schedule, unmerge=unmerge)
        self._signature = inspect.signature(encoder.base.forward)
        self._takes_keywords = _takes_keywords(self._signature)
        self._carries = [_takes_keywords(inspect.signature(block.module.forward)) for block in encoder.blocks]

    def _attach(self) -> None:
        encoder = self.encoder
        self._undo.append(watch_modules(encoder.base, [block.attention for block in encoder.blocks], self))
        self._note(encoder.base.register_forward_pre_hook(unless_aside(self._before_model), with_kwargs=True))
        self._note(encoder.base.register_forward_hook(unless_aside(self._after_model)))
        embeddings = getattr(encoder.base, "embeddings", None)
        if isinstance(embeddings, nn.Module):
            self._note(embeddings.register_forward_pre_hook(unless_aside(self._before_embeddings), with_kwargs=True))
        if encoder.pooler is not None:
            self._note(encoder.pooler.register_forward_pre_hook(unless_aside(self._before_pooler), with_kwargs=True))
        for index, block in enumerate(encoder.blocks):
            before = unless_aside(partial(self._before_block, index))
            self._note(block.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._note(
                block.attention.register_forward_pre_hook(unless_aside(self._before_attention), with_kwargs=True)
            )
            self._hook_second_half(index, block)
        if encoder.whole and self.gives_whole:
            self._note(encoder.blocks[-1].module.register_forward_hook(unless_aside(self._after_blocks)))

    # One forward ------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        refuse_tracing(self._name)
        pixels = pixels_of(args, kwargs)
        given = self._signature.bind_partial(*args, **kwargs).arguments
        if given.get("bool_masked_pos") is not None:
            raise QuickmergeError("bool_masked_pos must be None inside a quickmerge run, got a mask")
        call = Call(self.encoder.grid(pixels))
        if "noise" in self._signature.parameters:
            kwargs = self._in_raster_order(args, kwargs, given, call)
        shapes = given.get("spatial_shapes")
        if isinstance(shapes, Tensor):
            call.grid = self._shaped(shapes, call.grid)
        call.valid = self._valid(given, call)
        self.call = self._active = call
        if self._takes_keywords:
            kwargs = {**kwargs, CALL: self.call}
        return args, kwargs

    def _in_raster_order(self, args: Any, kwargs: dict[str, Any], given: dict[str, Any], call: Call) -> dict[str, Any]:
        """Patches that a model shuffles by random numbers stay where they are."""
        noise, count = given.get("noise"), call.grid[0] * call.grid[1] * call.grid[2]
        pixels = pixels_of(args, kwargs)
        if noise is None:
            rising = torch.arange(count, device=pixels.device, dtype=torch.float32) / count
            return {**kwargs, "noise": rising.expand(len(pixels), -1)}
        if not bool((noise[:, 1:] > noise[:, :-1]).all()):
            raise QuickmergeError("noise must be None or rising inside a quickmerge run, or patches would be shuffled")
        return kwargs

    def _shaped(self, shapes: Tensor, grid: tuple[int, int, int]) -> tuple[int, int, int]:
        """The grid of patches that are cut already, one line of them where images differ in shape."""
        found = {(int(high), int(wide)) for high, wide in shapes.tolist()}
        high, wide = next(iter(found))
        if len(found) == 1 and high * wide == grid[0] * grid[1] * grid[2]:
            return 1, high, wide
        if self.reducer.name in GRIDDED:
            raise QuickmergeError(
                f"reducer {self.reducer.name} goes by the places of patches on one grid, and spatial_shapes are "
                f"{sorted(found)} padded to {grid[2] * grid[1]} patches: give images of one shape, or another reducer"
            )
        return 1, 1, grid[0] * grid[1] * grid[2]

    def _valid(self, given: dict[str, Any], call: Call) -> Tensor | None:
        """Which patches are there, ``(B, N)`` bool; None where all are."""
        name = next((name for name in MASKS if isinstance(given.get(name), Tensor)), None)
        if name is None:
            return None
        call.masked = True
        valid: Tensor = given[name].flatten(1).bool()
        if bool(valid.all()):
            return None
        if valid.shape[1] != call.grid[0] * call.grid[1] * call.grid[2] or bool((valid[:, 1:] & ~valid[:, :-1]).any()):
            raise QuickmergeError(
                f"{name} must mark, for each patch, padding behind the patches of an image inside a quickmerge run, "
                "got padding between them"
            )
        return valid

    def _before_embeddings(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # A compiler may take the hooks of the model itself as a function apart: here it is inside of the forward.
        self.encoder.grid(pixels_of(args, kwargs))

    def _before_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        given = kwargs.pop(CALL, None)
        call: Call = given or self._current()
        self._active = call
        if self._carries[index]:
            kwargs[CALL] = call
        # What tells a block computed again which forward it is of is a keyword, that its checkpoint has to hold.
        if _recomputes(module) and not (self._carries[index] and (given is not None or not replays_hooks(module))):
            raise UnsupportedModelError(
                f"{self._name} must not recompute its blocks inside a quickmerge run, since no keywords are handed "
                "on to them: call gradient_checkpointing_disable() first"
            )
        if not args:
            args = (kwargs.pop(first_argument(module)),)
        hidden = self._enter_block(call, index, args[0])
        level, rest = call.levels[index], args[1:]
        if level is not None and kwargs.get("interpolate_pos_encoding") and _has_relative_bias(module):
            raise QuickmergeError(
                "interpolate_pos_encoding must be False inside a quickmerge run of a model with relative positions"
            )
        layout = self.encoder.blocks[index].layout
        if level is not None and layout is not None:
            rest, kwargs = _moved(module, layout, rest, kwargs, level, call)
        return (hidden, *rest), kwargs

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
            if mask is not None and mask.shape[-1] == state.tokens:
                mask = as_bias(pick(mask, level), query.dtype)
            mask = bias if mask is None else mask if bias is None else mask + bias
        if state.targets[layer] is not None and not self.reducer.before:
            scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
            state.traces[layer] = AttentionTrace(query, key, value, scaling)
        return call(module, query, key, value, mask, *args[4:], **kwargs)

    # Handing out ------------------------------------------------------------------------------------------------

    def _after_blocks(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Give every patch to parts that read them together; `_after_model` takes the copies away again."""
        level = self._current().last
        if level is None:
            return None
        return with_tokens(output, full_length(tokens_of(output), level))

    def _before_pooler(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._current()
        level = call.last
        if level is None:
            return None
        width = level.size.shape[1]

        def whole(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if value.ndim == 3 and value.shape[1] == width:
                return _pooled(value, level, call)
            if value.ndim == 2 and value.shape == level.slot.shape and not value.is_floating_point():
                return value * (level.slot >= 0).to(value.dtype)  # a mask, in which what was dropped is no longer
            return value

        return tuple(map(whole, args)), {name: whole(value) for name, value in kwargs.items()}

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._current()
        level = call.last
        if level is None:
            return output
        last = output.last_hidden_state
        if self.encoder.whole and self.gives_whole and last is not None:
            if last.shape[1] != call.tokens:
                return output  # joined to others, or without what stands in front: nothing is slot by slot any more
            last = last.gather(1, first_members(level)[..., None].expand(-1, -1, last.shape[-1]))
        slots = level.size.shape[1]
        for name, value in output.items():
            # Some hand out patches without what stands in front of them, too.
            if call.prefix and isinstance(value, Tensor) and value.ndim == 3 and value.shape[1] == slots - call.prefix:
                padded = nn.functional.pad(value, (0, 0, call.prefix, 0))
                output[name] = self._handed_out(padded, level, call)[:, call.prefix :]
        output.last_hidden_state = self._handed_out(last, level, call)
        states = getattr(output, "hidden_states", None)
        if states is not None and self.encoder.model is not self.encoder.base:
            output.hidden_states = tuple(_state(call, index, state) for index, state in enumerate(states))
        return output

    def _handed_out(self, slots: Tensor, level: Level, call: Call) -> Tensor:
        if self.unmerge:
            return full_length(slots, level)
        return slots if self.encoder.model is self.encoder.base else _pooled(slots, level, call)


def _state(call: Call, index: int, state: Tensor | None) -> Tensor | None:
    """What enters block ``index``, or leaves the last one, at full length: heads read it patch by patch."""
    if state is None or index >= len(call.levels):
        return state
    for level in (call.arriving.get(index), call.levels[index]):
        if level is not None and state.shape[1] == level.size.shape[1]:
            return full_length(state, level)
    return state


def _pooled(slots: Tensor, level: Level, call: Call) -> Tensor:
    """The tokens that whatever pools them shall read; all of them, where a mask will tell which of them are there."""
    return spread(slots, replace(level, alive=None) if call.masked else level, call.prefix)


def _moved(
    module: nn.Module, layout: Layout, rest: tuple[Any, ...], kwargs: dict[str, Any], level: Level, call: Call
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is told of places, for the slots that it reads."""
    return at_places(
        rest, kwargs, level.position, tokens=call.tokens, prefix=call.prefix, form=layout.form,
        told=where_told(module, layout.told, len(rest)),
    )  # fmt: skip


def _takes_keywords(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _recomputes(block: nn.Module) -> bool:
    """Whether a block's inside runs again in the backward pass."""
    checkpointing = block.training and getattr(block, "gradient_checkpointing", False)
    return bool(checkpointing) and torch.is_grad_enabled()


def _has_relative_bias(block: nn.Module) -> bool:
    return getattr(block, "relative_position_bias", None) is not None


# Videos through an encoder of images: every frame on its own, then merging across time.


@dataclass(frozen=True)
class FrameTokens:
    """The patches of a video, merged within frames and across them.

    Args:
        hidden: ``(B, K, D)`` features of the slots, in the order of their places, frame by frame.
        size: ``(B, K)`` how many patches each slot stands for; 0 where it only pads a ragged batch.
        position: ``(B, K)`` where each slot stands among the T H W patches.
        slot: ``(B, T H W)`` the slot of every patch, -1 where it was dropped.
        special: ``(B, T, p, D)`` class and register tokens of each frame, which are never merged.
        grid: ``(T, H, W)``.
        frame_tokens: patches left of each frame by the encoder, before merging across time.
    """

    hidden: Tensor
    size: Tensor
    position: Tensor
    slot: Tensor
    special: Tensor
    grid: tuple[int, int, int]
    frame_tokens: int

    def unmerge(self) -> Tensor:
        """Every patch with the features of its slot, ``(B, T H W, D)``; zero where it was dropped."""
        return to_members(self.hidden, self.slot)


def encode_frames(
    model: Any,
    pixels: Tensor,
    across: Reducer,
    *,
    reducer: Reducer | None = None,
    layer: Any = None,
) -> FrameTokens:
    """Encode every frame of videos with an encoder of images, then merge their patches across time.

    What follows, such as a language model, reads ``K`` tokens for a video and not ``T H W``. A method that compares
    keys compares the features here, since there is no attention between frames. `GridMerge` is made for this place: the
    sets of `ToMe` alternate over all patches, so that on a grid of an even number of patches the same place of two
    frames is always in the same set, and never merges.

    Args:
        model: a vision transformer for images, without a head, see `quickmerge.models.encoder.find_encoder`.
        pixels: ``(B, T, C, H, W)``.
        across: the method that merges the patches of all frames, with its ``keep``, a share of all T H W patches; a
            `GridMerge` heeds their places in space and time.
        reducer: a method that takes tokens out inside the encoder already; None for none.
        layer: where that one acts, see `quickmerge.reduce`.

    Raises:
        ValueError: if ``pixels`` is no batch of videos, or the model reads videos itself.
    """
    if pixels.ndim != 5:
        raise ValueError(f"pixels must be videos (B, T, C, H, W), got shape {tuple(pixels.shape)}")
    encoder = find_encoder(model)
    if hasattr(encoder.config, "num_frames"):
        raise ValueError(f"model must encode images, and {type(model).__name__} reads videos: run it inside reduce()")
    b, t = pixels.shape[:2]
    rows, columns = encoder.grid(pixels.flatten(0, 1))[1:]
    run = None if reducer is None else reduce_vit(model, reducer, layer)
    with run or nullcontext():
        hidden = model(pixels.flatten(0, 1)).last_hidden_state
    level = None if run is None or run.call is None else run.call.last
    prefix = hidden.shape[1] - rows * columns if level is None else int(run.call.prefix)  # type: ignore[union-attr]
    n = hidden.shape[1] - prefix
    patch = torch.arange(rows * columns, device=hidden.device)
    if level is None:
        size, place, slot = torch.ones(b * t, n, dtype=torch.long, device=hidden.device), patch.expand(b * t, -1), None
    else:
        if level.valid is not None:
            raise ValueError("reducer must leave as many tokens of every frame, got a budget of its own for each")
        size, place, slot = level.size[:, prefix:], level.position[:, prefix:] - prefix, level.slot[:, prefix:] - prefix
    frame = torch.arange(t, device=hidden.device).repeat(b)[:, None]
    features = hidden[:, prefix:].reshape(b, t * n, -1)
    key = features[:, None]
    view = TokenView(
        features,
        size=size.reshape(b, -1),
        position=(frame * rows * columns + place).reshape(b, -1),
        length=torch.full((b,), t * rows * columns, device=hidden.device),
        grid=(t, rows, columns),
        evidence=Evidence(attention=(AttentionTrace(key, key, key, features.shape[-1] ** -0.5),)),
    )
    plan = across.plan(view)
    if slot is None:
        own = (frame * n + patch).reshape(b, -1)
    else:
        own = torch.where(slot >= 0, frame * n + slot, -1).reshape(b, -1)
    return FrameTokens(
        hidden=across.combine(view, plan, features),
        size=plan.size,
        position=plan.position,
        slot=follow(own, plan.slot),
        special=hidden[:, :prefix].reshape(b, t, prefix, hidden.shape[-1]),
        grid=(t, rows, columns),
        frame_tokens=n,
    )
