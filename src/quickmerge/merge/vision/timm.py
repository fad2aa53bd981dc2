"""Vision transformers of timm with fewer tokens, through module hooks alone.

timm hands no keywords down to its blocks, so a run finds the forward that a block belongs to in other ways. A forward
begins where pixels enter the patch embedding. A block that gradient checkpointing computes again is given the very
tensor that it was given before, by which the run knows it. A block that is called by itself, and not by the list of
blocks, is called by a function that collects what blocks give (``forward_intermediates``): it gives all tokens, each
with the features of its slot, and the next block reads the slots again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.vision.run import Call, Level, VisionRun, full_length, schedule_for, spread
from quickmerge.models.attachment import PerThread, refuse_tracing, stand_in
from quickmerge.models.encoder import RUN, TimmEncoder, find_timm_encoder


def reduce_timm(
    model: nn.Module,
    reducer: Reducer,
    layer: int | Sequence[int] | Removal | None = None,
    *,
    unmerge: bool = False,
) -> VisionRun:
    """Make a vision transformer of timm read with fewer tokens; see `quickmerge.merge.attach.reduce`."""
    encoder = find_timm_encoder(model)
    return TimmRun(encoder, reducer, schedule_for(encoder, reducer, layer), unmerge=unmerge)


@dataclass
class TimmCall(Call):
    """The state of one forward of timm.

    ``pooled`` says that the model itself was called, which pools what the last norm gives; ``listed`` that blocks are
    called by the list that holds them; ``done`` how many blocks have been gone through. ``query``, ``key (B, H, N, d)``
    and ``value`` are of the attention that is being computed.
    """

    pooled: bool = False
    listed: bool = False
    done: int = 0
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None


class TimmRun(VisionRun):
    """A run on a model of timm."""

    encoder: TimmEncoder
    _called = PerThread(bool)
    _unpooled = PerThread(bool)

    def __init__(
        self, encoder: TimmEncoder, reducer: Reducer, schedule: Removal | tuple[int, ...] | None, *, unmerge: bool
    ) -> None:
        super().__init__(encoder, reducer, schedule, unmerge=unmerge)
        self._inputs = WeakTensorKeyDictionary()

    def _attach(self) -> None:
        base: Any = self.encoder.base
        self._undo.append(stand_in(base, RUN, self))
        self._note(base.register_forward_pre_hook(self._before_model))
        self._note(base.patch_embed.register_forward_pre_hook(self._before_pixels))
        self._note(base.blocks.register_forward_pre_hook(self._before_list))
        self._note(base.norm.register_forward_hook(self._after_norm))
        if isinstance(getattr(base, "fc_norm", None), nn.Module):
            self._note(base.fc_norm.register_forward_pre_hook(self._before_head))
        for index, block in enumerate(self.encoder.blocks):
            attention: Any = block.attention
            before = partial(self._before_block, index)
            self._note(block.module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            self._note(attention.register_forward_pre_hook(partial(self._before_attention, index), with_kwargs=True))
            for part, name in ((attention.q_norm, "query"), (attention.k_norm, "key"), (attention.qkv, "value")):
                self._note(part.register_forward_hook(partial(self._after_projection, index, name)))
            self._note(attention.register_forward_hook(partial(self._after_attention, index)))
            self._hook_second_half(index, block)

    # One forward ------------------------------------------------------------------------------------------------

    def _before_model(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._called = True

    def _before_pixels(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        refuse_tracing(self._name)
        pooled = self._called
        self._called = self._unpooled = False
        if not (isinstance(args[0], Tensor) and args[0].ndim == 4):
            raise ValueError(f"x must be images (B, C, H, W), got {_shape(args[0])}")
        self.call = self._active = TimmCall(self.encoder.grid(args[0]), pooled=pooled)

    def _before_list(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._current().listed = True

    def _before_block(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if kwargs.get("attn_mask") is not None or kwargs.get("is_causal"):
            raise QuickmergeError("attn_mask must be None and is_causal False inside a quickmerge run")
        hidden: Tensor = args[0]
        call = self._call_of(index, hidden)
        if not call.tokens:
            self._check_tokens(call, hidden)
        level = call.arriving.get(index, call.levels[index]) if call.tokens else None
        if level is not None and self._gives_all(call):
            hidden = _slots_of(hidden, level)
        return (self._enter_block(call, index, hidden), *args[1:]), kwargs

    def _call_of(self, index: int, hidden: Tensor) -> TimmCall:
        """The forward to which block ``index`` with the input ``hidden`` belongs."""
        if not self._checkpoints():
            return self._current()
        known = self._inputs.get(hidden)  # type: ignore[no-untyped-call]
        call: TimmCall = self._current() if known is None else known
        if known is None:
            if call.done != index:
                raise QuickmergeError(
                    f"block {index} was given tokens that no forward inside this quickmerge run has given it; with "
                    "gradient checkpointing, it must be the kind that is not reentrant"
                )
            self._inputs[hidden] = call
        self._active = call
        return call

    def _checkpoints(self) -> bool:
        return bool(getattr(self.encoder.base, "grad_checkpointing", False))

    def _check_tokens(self, call: TimmCall, hidden: Tensor) -> None:
        _, height, width = call.grid
        expected = int(self.encoder.base.num_prefix_tokens) + height * width  # type: ignore[arg-type]
        if hidden.shape[1] != expected:
            raise QuickmergeError(
                f"patch_drop must leave all {expected} tokens inside a quickmerge run, got {hidden.shape[1]}: "
                "call eval() or set its prob to 0"
            )

    def _gives_all(self, call: TimmCall) -> bool:
        """Whether blocks give all tokens, because who called them one by one may look at what they give."""
        if call.pooled or call.listed:
            return False
        if not self.unmerge:
            raise QuickmergeError(
                "unmerge must be True inside a quickmerge run for a function that calls the blocks one by one, such as "
                "forward_intermediates, or forward_features with gradient checkpointing"
            )
        return True

    # Attention --------------------------------------------------------------------------------------------------

    def _before_attention(self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        level = self._current().levels[index]
        return None if level is None or level.bias is None else (args, {**kwargs, "attn_mask": level.bias})

    def _after_projection(self, index: int, name: str, module: nn.Module, args: Any, output: Tensor) -> None:
        call = self._current()
        if call.targets[index] is not None and not self.reducer.before:
            setattr(call, name, output)

    def _after_attention(self, index: int, module: Any, args: tuple[Any, ...], output: Tensor) -> None:
        call = self._current()
        if call.query is None or call.key is None or call.value is None:
            return
        rows, tokens = call.value.shape[:2]
        value = call.value.view(rows, tokens, 3, module.num_heads, module.head_dim)[:, :, 2].transpose(1, 2)
        call.traces[index] = AttentionTrace(call.query, call.key, value, module.scale)
        call.query = call.key = call.value = None

    # Handing out ------------------------------------------------------------------------------------------------

    def _after_block(self, index: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        call = self._current()
        short = super()._after_block(index, module, args, output)
        call.done = index + 1
        level = call.levels[index + 1]
        if level is None or not self._gives_all(call):
            return short
        return full_length(output if short is None else short, level)

    def _after_norm(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        call = self._current()
        level = call.levels[call.done] if call.tokens else None
        if level is None:
            return None
        if self._gives_all(call):
            # Blocks gave all tokens, and zeros for those that were dropped: a norm makes something of zeros.
            self._unpooled = level.alive != level.slot.shape[1]
            return torch.where((level.slot >= 0)[..., None], output, 0.0) if self._unpooled else None
        if call.pooled or (self.encoder.model is not self.encoder.base and not self.unmerge):
            return spread(output, level, 0 if getattr(self.encoder.base, "pool_include_prefix", False) else call.prefix)
        self._unpooled = not self.unmerge or level.alive != level.slot.shape[1]
        return full_length(output, level) if self.unmerge else output

    def _before_head(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        base: Any = self.encoder.base
        if self._unpooled and (self.encoder.pooler is not None or base.global_pool not in ("token", "max")):
            raise QuickmergeError(
                "forward_head would count a slot once, however many tokens it stands for: inside a quickmerge run "
                "call the model itself"
            )

    def _current(self) -> TimmCall:
        call = super()._current()
        assert isinstance(call, TimmCall)
        return call


def _slots_of(hidden: Tensor, level: Level) -> Tensor:
    """The inverse of `full_length`, ``(B, N, D)`` to ``(B, K, D)``: every slot as its first member has it."""
    rows, tokens = level.slot.shape
    index = torch.arange(tokens, device=hidden.device).expand(rows, -1)
    index = torch.where(level.slot >= 0, index, tokens - 1)
    first = index.new_full(level.size.shape, tokens - 1).scatter_reduce(1, level.slot.clamp_min(0), index, "amin")
    return hidden.gather(1, first[..., None].expand(-1, -1, hidden.shape[-1]))


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
