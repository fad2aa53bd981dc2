"""Merging patches inside the vision tower of a vision-language model, and what its language model gets of them.

A tower's blocks read fewer tokens, as those of any vision transformer (`quickmerge.merge.vision`), and what it hands
out is of full length again: every patch has the features of its slot. So the model picks its layers, leaves out a class
token and counts placeholders as always. Where every patch is a visual token, the language model need not read the
copies: behind the projector, which sees each token alone, all of a slot but one go, and their plan is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.plan import follow, to_members
from quickmerge.merge.tokens.removal import Removal
from quickmerge.merge.vision.run import Call, Level, unless_aside
from quickmerge.merge.vision.vit import TransformersRun
from quickmerge.models.encoder import Encoder
from quickmerge.models.vlm import Vlm


class TowerRun(TransformersRun):
    """A run in the tower of a vision-language model, which is part of a `quickmerge.VlmRun`.

    Args:
        vlm: the model.
        encoder: the parts of its tower.
        reducer: the method.
        schedule: where it acts.
        unmerge: whether the language model shall read as many visual tokens as without it, copies among them.
    """

    gives_whole = False  # a hook of its own makes whole what the tower hands out

    def __init__(
        self,
        vlm: Vlm,
        encoder: Encoder,
        reducer: Reducer,
        schedule: Removal | tuple[int, ...] | None,
        *,
        unmerge: bool,
    ) -> None:
        super().__init__(encoder, reducer, schedule, unmerge=unmerge)
        self.vlm = vlm
        self.leaders: Tensor | None = None
        """``(B, N)`` long, of the last forward: for each of the tower's tokens the one at whose place the slot stands
        that it is in, where the model takes its features; -1 if it was dropped. None if every token is alone."""

    def _attach(self) -> None:
        super()._attach()
        # In front of whatever else looks at what the tower gives.
        self._note(self.vlm.tower.register_forward_hook(unless_aside(self._hand_out), prepend=True))

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        mask = kwargs.get("patch_attention_mask")
        if isinstance(mask, Tensor) and not bool(mask.all()):
            raise QuickmergeError(
                "pixel_attention_mask must mark every pixel of a tile where patches are merged in the vision tower, "
                "got tiles with padding inside, which would be merged with the image"
            )
        return super()._before_model(module, args, kwargs)

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return output

    # Handing out ------------------------------------------------------------------------------------------------

    def seen_by(self, block: int) -> Level | None:
        """The tokens that the attention of a block read in the last forward; None for all of them, each alone."""
        return self._current().levels[block]

    def _level(self, call: Call, index: int, state: Tensor | None) -> Level | None:
        """The tokens of the ``index``-th state that the tower can hand out, the first of which enters block 0."""
        # Where a method takes tokens out in front of a block, a state is what arrives there; but the first one is
        # noted with what the block was given, after that.
        level = call.arriving.get(index, call.levels[index])
        width = call.tokens if level is None else level.size.shape[1]
        return level if state is None or state.shape[1] == width else call.levels[index]

    def _hand_out(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Make what the tower gives as long as it would have been."""
        call, self.leaders = self._current(), None
        states = getattr(output, "hidden_states", None)
        if call.last is not None:
            output.last_hidden_state = _filled(output.last_hidden_state, call.last, call.prefix)
        top = len(self.encoder)
        if states is not None and self.vlm.encoder is not None:
            layers = self.vlm.config.vision_feature_layer
            chosen = [layers] if isinstance(layers, int) else layers
            top = max(layer % len(states) for layer in chosen)
        level = self._level(call, top, None)
        if states is not None:
            whole: list[Tensor | None] = []
            for index, state in enumerate(states):
                own = self._level(call, index, state)
                if state is not None and own is not None:
                    state = _filled(state, own, call.prefix)
                if state is not None and level is not None and index < top and not self.unmerge:
                    state = _averaged(state, level)
                whole.append(state)
            output.hidden_states = tuple(whole)
        if level is not None:
            self.leaders = follow(level.slot, level.position)
        return output


def _filled(y: Tensor, level: Level, prefix: int) -> Tensor:
    """Every token with the features of its slot, ``(B, K, D)`` to ``(B, N, D)``.

    A patch that was dropped gets the mean of those that were not.
    """
    out = to_members(y, level.slot)
    if level.alive == level.slot.shape[1]:
        return out
    there = (level.slot >= 0)[..., None]
    mean = out[:, prefix:].sum(1, keepdim=True) / there[:, prefix:].sum(1, keepdim=True)
    return torch.where(there, out, mean).to(y.dtype)


def _averaged(x: Tensor, level: Level) -> Tensor:
    """Every token with the mean of its slot's members, ``(B, N, D)``; one that was dropped as it is.

    So the copies of a slot stay copies where features of several layers stand side by side.
    """
    member = (level.slot >= 0)[..., None]
    into = level.slot.clamp_min(0)[..., None].expand_as(x)
    precise = x.to(torch.promote_types(x.dtype, torch.float32))
    sums = precise.new_zeros(x.shape[0], level.size.shape[1], x.shape[-1])
    counts = sums.scatter_add(1, into, member.to(sums.dtype).expand_as(x))
    sums = sums.scatter_add(1, into, torch.where(member, precise, 0.0))
    return torch.where(member, (sums / counts.clamp_min(1)).gather(1, into).to(x.dtype), x)
