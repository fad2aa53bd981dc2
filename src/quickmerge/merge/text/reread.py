"""Prompts that are read twice: by the lower blocks, which choose tokens, and then by all blocks, what was chosen.

The scout is a forward of the model's own decoder that ends where its last attention has its queries and keys: nothing
of the model is copied, and nothing above is computed. Then the decoder reads the tokens that are kept in the place of
the prompt, and a cache that tells the prompt's length goes on behind them.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.text.blocks import trace_of
from quickmerge.merge.text.merged_cache import Segment, check_fillable, pick_columns, state_of
from quickmerge.merge.text.modes import Prefix
from quickmerge.merge.text.prefix_call import CALL
from quickmerge.merge.text.rows import check_one_text, check_padding, plan_rows
from quickmerge.merge.text.shortened import ShortCall, ShortenedRun, ShortPrompt, next_positions
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.view import Evidence, TokenView
from quickmerge.models.attachment import PerThread
from quickmerge.models.compat import given_cache, without_cache
from quickmerge.models.decoder import AttentionFunction, Decoder, only_asked
from quickmerge.models.traits import not_plain

__all__ = ["RereadRun"]


class _Seen(Exception):  # noqa: N818
    """The scout has seen enough."""


@dataclass
class _Scout:
    """What a scout's forward collects: traces of the layers from ``first`` to ``last``, where it ends."""

    first: int
    last: int
    traces: list[AttentionTrace] = field(default_factory=list)


class RereadRun(ShortenedRun):
    """See `quickmerge.reduce`. A prompt that fills an empty cache is read twice, see `Reread`.

    A sliding window counts entries where the tokens keep their positions. Where entries leave the cache besides, its
    ``keep`` is a share of the prompt as it was given, and so is its ``min_tokens``: of half of a prompt half of the
    cache of what was read stays with ``keep=0.25``.
    """

    reducer: Reread
    _whose = "that reads a prompt twice"
    _read_as = "a prompt is read twice"
    _scout: PerThread[_Scout | None] = PerThread(lambda: None)

    def __init__(self, decoder: Decoder, reducer: Reread, mode: Prefix, cache: Evictor | None = None) -> None:
        decoder.need("a prompt that is read twice", not_plain)
        if "position_ids" not in inspect.signature(decoder.base.forward).parameters:
            raise UnsupportedModelError(
                f"a prompt that is read twice can't be served for {type(decoder.model).__name__}, which takes no "
                "position_ids, by which what is kept stands where it stood"
            )
        super().__init__(decoder, reducer, None, mode, cache)

    # Reading ----------------------------------------------------------------------------------------------------

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Shorten a prompt, or fit what is read after one to its cache."""
        mask, ids, embeds = inputs.get("attention_mask"), inputs.get("input_ids"), inputs.get("inputs_embeds")
        given: Any = embeds if ids is None else ids
        cache = given_cache(inputs)
        if not prompt:
            state = state_of(cache)
            if state is None or not state.short:
                return super().begin(prompt, inputs)
            see = self._seen(mask, given.shape[1])
            if see is not None:
                return self._read_tree(inputs, given, see)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise QuickmergeError("attention_mask must be a 2-D padding mask inside a quickmerge run, got another kind")
        if not prompt:
            self._check_seam(mask)
            return self._read_on(inputs, given, mask, inputs.get("position_ids"))
        check_fillable(cache)
        shape, device = given.shape[:2], given.device
        valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
        if valid.shape != shape:
            raise QuickmergeError(f"attention_mask must be {tuple(shape)}, got {tuple(valid.shape)}")
        check_padding(valid)
        check_one_text(inputs, valid, cache is not None)
        self._check_side(valid)
        call = self._prompt_call(valid, ids, mask is not None)
        self._now = call
        assert call.whole is not None
        changed: dict[str, Any] = {}
        if not bool(call.whole.all()) and not self._keeps_all():
            began = self.clock()
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                plan = self._choose(call, inputs, given)
            changed = self._shorten(call, inputs, plan)
            self.stats.reducer_seconds += self.clock() - began
        return {**changed, CALL: call}

    def _keeps_all(self) -> bool:
        """Whether nothing can be left out, so that nobody has to look."""
        return self.reducer.keep == 1 and isinstance(self.reducer.keep, (int, float))

    def _prompt_call(self, valid: Tensor, ids: Tensor | None, masked: bool) -> ShortCall:
        """The call that reads a prompt ``valid (B, N)``."""
        kept = self._protection(valid, ids)
        length, stats = valid.sum(-1), self.stats
        stats.rows, stats.tokens_in = len(valid), float(length.float().mean())
        state = ShortPrompt(
            stats, width=valid.shape[1], valid=valid, masked=masked, recount=self.reducer.positions == "consecutive"
        )
        return ShortCall(
            True, state, valid, kept.protected, kept.exempt, kept.asked, length,
            whole=self._whole(length, kept.protected),
            places=torch.arange(valid.shape[1], device=valid.device).expand(valid.shape), ids=ids, given=length,
        )  # fmt: skip

    def _choose(self, call: ShortCall, inputs: dict[str, Any], given: Tensor) -> MergePlan:
        """What of a prompt is kept, by what the scout sees of it."""
        assert call.whole is not None and call.length is not None and call.protected is not None
        view = TokenView(
            # Nothing is merged, so that nobody asks what tokens hold.
            hidden=torch.zeros(*call.valid.shape, 1, device=given.device),
            valid=call.valid, protected=call.protected, position=call.places, exempt=call.exempt, length=call.length,
            evidence=Evidence(attention=self._look(inputs), depth=len(self.decoder)),
        )  # fmt: skip
        shut = call.whole.tolist()
        rows = [row for row, whole in enumerate(shut) if not whole] if any(shut) else None
        return plan_rows(view, rows, self.reducer.plan, self.reducer.align).plan

    def _look(self, inputs: dict[str, Any]) -> list[AttentionTrace]:
        """Queries and keys of the scout's last layers, as all tokens have them."""
        last = self.reducer.scout(len(self.decoder))
        scout = self._scout = _Scout(max(0, last + 1 - self.reducer.needs.layers), last)
        try:
            with only_asked(self):
                self.decoder.base(**{**without_cache(inputs), "use_cache": False})
        except _Seen:
            return scout.traces
        finally:
            self._scout = None
        raise AssertionError("the scout's last block has no attention of ours")  # find_decoder has seen to that

    def _shorten(self, call: ShortCall, inputs: dict[str, Any], plan: MergePlan) -> dict[str, Any]:
        """The arguments of the decoder by which it reads what is kept; nothing where all tokens are."""
        call.decide(0, plan)
        if bool((plan.valid.sum(-1) == call.valid.sum(-1)).all()):
            return {}
        state = call.state
        assert isinstance(state, ShortPrompt)
        seat = torch.where(plan.valid, plan.position, 0)
        were = inputs.get("position_ids")
        were = (call.valid.long().cumsum(-1) - 1).clamp_min(0) if were is None else were
        count = plan.valid.long().cumsum(-1)
        state.true_position = next_positions(were, call.valid)
        if state.recount:
            state.next_position, positions = count[:, -1], torch.where(plan.valid, count - 1, 0)
        else:
            state.next_position, positions = state.true_position, pick_columns(were, seat)
        changed: dict[str, Any] = {"position_ids": positions}
        for name in ("input_ids", "inputs_embeds"):
            held = inputs.get(name)
            if held is not None:
                changed[name] = pick_columns(held, seat) if held.ndim == 2 else pick_columns(held, seat, -2)
        # Without any mask, jumps in the positions would be taken for the seams of packed texts.
        changed["attention_mask"] = plan.valid.long()
        state.masked = state.masked or not bool(plan.valid.all())
        call.valid = state.valid = plan.valid
        call.places, call.source[0] = plan.position, seat
        call.segments[0] = state.segments[0] = Segment.of(plan, None, self.reducer.proportional)
        state.seats = plan.position
        return changed

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Of the scout collect queries and keys, and end it; else leave attention as it is."""
        scout = self._scout
        if scout is None:
            return super().attend(layer, call, module, args, kwargs)
        if layer >= scout.first:
            query, key, value = args[:3]
            scout.traces.append(trace_of(query, key, value, kwargs, self.decoder.traits[layer]))
        if layer == scout.last:
            raise _Seen
        return call(module, *args, **kwargs)
