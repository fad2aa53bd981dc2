"""Prompts that became shorter in front of the first block: what is left of one, and how what follows it fits on.

That is so where visual tokens are taken out behind a projector, and where a prompt is read twice, the second time
without the tokens that nobody looked at. The model makes masks and rotary tables by itself for what it is given; its
cache tells the length of the prompt as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.errors import QuickmergeError
from quickmerge.merge.text.merged_cache import PromptState, holding
from quickmerge.merge.text.prefix import PrefixRun
from quickmerge.merge.text.prefix_call import CALL, PrefixCall
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.models.attachment import refuse_assisted
from quickmerge.models.columns import places_read, stored
from quickmerge.models.compat import given_cache


@dataclass
class ShortPrompt(PromptState):
    """What a cache knows of a prompt that was shortened in front of the first block.

    All that is of ``valid``'s width is as the first block read it. ``width``: columns as given. ``true_position (...,
    B)``: the position that the first token behind the prompt would have had, and ``next_position`` the one that it
    gets; None where the model counts. ``masked``: whether a mask was given or is needed. ``recount``: whether positions
    are counted anew, whatever was given.
    """

    short: ClassVar[bool] = True
    gone_are: ClassVar[str] = "those that are gone included"
    width: int = 0
    valid: Tensor = field(default_factory=lambda: torch.zeros(0))
    next_position: Tensor | None = None
    true_position: Tensor | None = None
    masked: bool = False
    recount: bool = False

    @property
    def shortened(self) -> bool:
        """Whether the first block already read less than was given."""
        return 0 in self.segments

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Rows of the cache were picked, moved or repeated."""
        super().each_row(change)
        self.valid = change(self.valid)
        for name in ("next_position", "true_position"):
            held = getattr(self, name)
            if held is not None:
                # Rows lie along the last axis.
                setattr(self, name, change(held.movedim(-1, 0)).movedim(0, -1))

    def follow(
        self, stored: int, new: int, mask: Tensor | None, given: Tensor | None
    ) -> tuple[dict[str, Any], Tensor, Tensor]:
        """Fit ``new`` further tokens a row to the cache, of which the first block's layer holds ``stored`` tokens.

        Args:
            stored: how many that are.
            new: how many are read now.
            mask: of everything read since the prompt, the prompt as it was given; None for no padding.
            given: positions that the caller gave, None where the model is left to count.

        Returns:
            The arguments of the language model to change; which of the new tokens are valid, ``(B, new)``; and the
            columns at which they stand, ``(B, new)``.

        Raises:
            QuickmergeError: if mask or positions are of another text than the one that was read.
        """
        rows, device = len(self.valid), self.valid.device
        since = stored - self.valid.shape[1]
        read = self.width + since + new
        if mask is not None and mask.shape[1] != read:
            raise QuickmergeError(
                f"attention_mask must have a column for each of the {read} tokens read so far, {self.gone_are}, got "
                f"{mask.shape[1]}"
            )
        behind = torch.ones(rows, since + new, device=device) if mask is None else mask[:, self.width :]
        valid = behind[:, -new:].bool()
        steps = since + torch.arange(new, device=device)
        places = (self.width + steps).expand(rows, -1)
        changed: dict[str, Any] = {}
        if not self.shortened:
            return changed, valid, places
        self.segments[0] = self.segments[0].extended(places, valid, stored)
        if self.masked or mask is not None:
            # The layers tell their length with what is gone, which stands in front.
            gone = behind.new_zeros(rows, self.width - self.valid.shape[1]).long()
            changed["attention_mask"] = torch.cat([gone, self.valid.long(), behind.long()], 1)
        if new > 1 and given is not None and self.true_position is not None:
            self._check(given, self.true_position[..., None] + steps)
        if self.next_position is not None and (self.recount or given is None):
            changed["position_ids"] = self.next_position[..., None] + steps
        return changed, valid, places

    def _check(self, given: Tensor, wanted: Tensor) -> None:
        """Refuse other positions than ``wanted``.

        One token at a time is how text is written; more may be what was read before, cut off at another place. Models
        whose positions count in a grid may be given these alone, once for all of its directions.
        """
        if wanted.ndim == 3 and (given.ndim == 2 or len(given) != len(wanted)):
            wanted = wanted[-1:] if given.ndim == 3 else wanted[-1]
        if given.shape[-1] != wanted.shape[-1] or not bool((given == wanted).all()):
            raise QuickmergeError(
                "position_ids must go on behind the prompt as it was before it was shortened, from "
                f"{wanted[..., 0].tolist()}; a further turn must be given its new ids alone, with an attention_mask "
                "for everything read so far"
            )


def next_positions(positions: Tensor, valid: Tensor) -> Tensor:
    """The position of the first token behind a prompt, ``(..., B)``, of positions ``(..., B or 1, N)``.

    Directions of a grid share one, that behind the farthest; of four lines of positions the first is the text's own.
    """
    positions = positions.expand(*positions.shape[:-2], *valid.shape)
    last = torch.where(valid, positions, -1).amax(-1) + 1
    if last.ndim == 1:
        return last
    text, grid = last[:-3], last[-3:]
    return torch.cat([text, grid.amax(0, keepdim=True).expand_as(grid)])


@dataclass
class ShortCall(PrefixCall):
    """The state of one forward. All that is of ``valid``'s width is as the first block reads it.

    ``places (B, K)``: the column of the given text at which each token stands.
    """

    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))


class ShortenedRun(PrefixRun):
    """A run that shortens prompts in front of the first block, and fits to them what is read behind them.

    A subclass reads prompts; its state is a `ShortPrompt` and its call a `ShortCall`.
    """

    shortens = True
    _whose: ClassVar[str]
    """What of, in words, where something is refused."""
    _read_as: ClassVar[str]

    def _around_generate(self, given: dict[str, Any], call: Callable[[], Any]) -> Any:
        refuse_assisted(
            self.decoder.model, given,
            f"inside a quickmerge run {self._whose}: drafted tokens don't fit a shortened prompt",
        )  # fmt: skip
        return super()._around_generate(given, call)

    def _tell_drafts(self, args: tuple[Any, ...], kwargs: dict[str, Any], drafts: int) -> Any:
        raise QuickmergeError(
            f"logits_to_keep must be 0 or 1 while {self._read_as}, got {drafts + 1}: there are logits "
            "for fewer tokens than there were"
        )

    def _read_tree(self, inputs: dict[str, Any], embeds: Tensor, see: Callable[[int], Tensor]) -> dict[str, Any]:
        """Read tokens behind a prompt that see of one another what ``see`` says, by block."""
        cache, (rows, new) = given_cache(inputs), embeds.shape[:2]
        state = self._short(cache, rows)
        held, places = stored(holding(cache)[0]), places_read()
        if places is None:
            behind = state.width + held - state.valid.shape[1]
            places = torch.arange(behind, behind + new, device=embeds.device).expand(rows, -1)
        valid = torch.ones_like(places, dtype=torch.bool)
        changed: dict[str, Any] = {}
        if state.shortened:
            segment = state.segments[0] = state.segments[0].extended(places, valid, held)
            windows = self.decoder.windows
            types = getattr(self.decoder.config, "layer_types", None) or []
            mask: Any = segment.tree_mask(see(0), windows[0])
            if isinstance(inputs["attention_mask"], Mapping):
                mask = {kind: segment.tree_mask(see(i), windows[i]) for i, kind in enumerate(types)}
            changed["attention_mask"] = mask
            positions = inputs.get("position_ids")
            there, now = state.true_position, state.next_position
            if state.recount and positions is not None and there is not None and now is not None:
                # As if the prompt had been shorter from the first.
                changed["position_ids"] = positions - (there - now)[..., None]
        self._now = ShortCall(False, state, valid, segments=dict(state.segments), places=places, see=see)
        return {**changed, CALL: self._now}

    def _read_on(
        self, inputs: dict[str, Any], embeds: Tensor, mask: Tensor | None, given: Tensor | None
    ) -> dict[str, Any]:
        """Read further tokens behind a prompt; ``given`` are the positions that the caller has given for them."""
        cache = given_cache(inputs)
        rows, new = embeds.shape[:2]
        state = self._short(cache, rows)
        changed, valid, places = state.follow(stored(holding(cache)[0]), new, mask, given)
        self._now = ShortCall(False, state, valid, segments=dict(state.segments), places=places)
        return {**changed, CALL: self._now}

    def _short(self, cache: Cache, rows: int) -> ShortPrompt:
        state = self._resume(cache, rows)
        assert isinstance(state, ShortPrompt)
        return state

    def _gone(self, call: PrefixCall, index: int) -> int:
        assert isinstance(call.state, ShortPrompt)
        return call.state.width - call.state.valid.shape[1] if call.first(index) == 0 else 0

    def _seats(self, plan: MergePlan, source: Tensor) -> Tensor:
        return plan.position

    def _reads(self, call: PrefixCall, layer: int) -> int | None:
        # In front of the first block the model itself makes masks and rotary tables for what it is given.
        return call.first(layer) or None

    def _places(self, call: PrefixCall, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        # Behind a prompt that another run merged inside the model, tokens stand where that says.
        return call.places if isinstance(call, ShortCall) else super()._places(call, hidden, kwargs)

    def _window_places(self, call: PrefixCall, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        places, state = super()._window_places(call, index, hidden, kwargs), call.state
        if isinstance(state, ShortPrompt) and state.first(index) == 0:
            # The model's windows count what is left of the prompt.
            places = places - (state.width - state.valid.sum(-1, keepdim=True))
        return places

    def _extend(self, call: PrefixCall, index: int, hidden: Tensor, cache: Cache, kwargs: dict[str, Any]) -> None:
        if index:  # what begins with the first block is done in front of the decoder
            super()._extend(call, index, hidden, cache, kwargs)
