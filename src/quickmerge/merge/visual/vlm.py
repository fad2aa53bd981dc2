"""Running a vision-language model with fewer visual tokens inside a ``with`` block, and leaving it as it was."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.run import VisualStats
from quickmerge.merge.text.merged_cache import Segment, check_fillable, pick_columns
from quickmerge.merge.text.modes import Prefix
from quickmerge.merge.text.prefix_call import CALL, PrefixCall
from quickmerge.merge.text.rows import check_one_text, check_padding
from quickmerge.merge.text.shortened import ShortCall, ShortenedRun, next_positions
from quickmerge.merge.tokens.budget import Schedule
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import Evidence, Known, TokenView
from quickmerge.merge.visual.features import FeatureWatch
from quickmerge.merge.visual.handed import (
    both_ways,
    further_arguments,
    lowest_block,
    shorter_arguments,
    shorter_masks,
)
from quickmerge.merge.visual.merged_tower import TowerRun
from quickmerge.merge.visual.plan import (
    KINDS,
    Decision,
    Image,
    decide,
    hand_on,
    instruction,
    read_images,
    special_ids,
    told_inside,
)
from quickmerge.merge.visual.prompt import VisualPrompt
from quickmerge.merge.visual.tower import Seen, TowerWatch
from quickmerge.models.attachment import PerThread, stands_aside
from quickmerge.models.compat import cache_name, given_cache
from quickmerge.models.moved import onto, read
from quickmerge.models.vlm import Vlm


@dataclass
class VisualCall(ShortCall):
    """The state of one forward that reads images.

    ``text``: columns of each row's instruction; ``beginning``: what the host knows of the sequence as it was given.
    """

    images: list[Image] = field(default_factory=list)
    beginning: Known | None = None
    text: list[Tensor] = field(default_factory=list)

    def visual(self, valid: Tensor) -> Tensor:
        """Which tokens of a sequence like ``valid (B, n)`` are visual by now."""
        marks = torch.zeros_like(valid)
        for image in self.images:
            assert image.now is not None
            marks[image.row, onto(image.now, valid.device)] = True
        return marks

    def follow_text(self, plan: MergePlan) -> None:
        """The instruction stands elsewhere after a merge."""
        slot = plan.slot
        self.text = [slot[row, onto(columns, slot.device)] for row, columns in enumerate(self.text)]


class VlmRun(ShortenedRun):
    """See `quickmerge.reduce` and `quickmerge.merge.attach.reduce_places`.

    In the forward that fills an empty cache visual tokens are merged or dropped, and above that all tokens of the
    prompt, each where it is asked for.

    Args:
        vlm: the model.
        visual: the method for visual tokens; None leaves them.
        layers: where it acts, rising: 0 behind the projector, or blocks of the language model.
        positions: see `quickmerge.reduce`.
        text: the method for all tokens, its blocks, and what stays alone; None leaves them.
        tower: the run that merges patches inside the vision tower; None for none.
        cache: what makes the cache smaller when a prompt has been read; None for nothing.
    """

    stats: VisualStats
    _whose = "of a vision-language model"
    _read_as = "a prompt with images is read"
    _turns = PerThread(int)

    def __init__(
        self,
        vlm: Vlm,
        visual: Reducer | None,
        layers: tuple[int, ...] = (),
        *,
        positions: str = "kept",
        text: tuple[Reducer, Schedule, Prefix] | None = None,
        tower: TowerRun | None = None,
        cache: Evictor | None = None,
    ) -> None:
        if cache is not None and cache.protect is not None:
            raise QuickmergeError(
                f"protect of {cache.name} must be None for {type(vlm.model).__name__}, since a cache that also holds "
                "images keeps what is protected where the text is merged: say Prefix(protect='literals') there"
            )
        self.vlm, self.positions, self.tower_run = vlm, positions, tower
        patches, words = None if tower is None else tower.reducer, None if text is None else text[0]
        asked = {"tower": patches, "visual": visual, Prefix.name: words}
        self.asked = {place: reducer for place, reducer in asked.items() if reducer is not None}
        """The methods by what they act on."""
        self.mode = " + ".join(self.asked) or "cache"
        first = next((each for each in (visual, words, patches) if each is not None), None)
        super().__init__(vlm.decoder, first, None, cache=cache)
        if text is not None:
            self._place(text[0].on(next(vlm.decoder.base.parameters()).device), *text[1:])
            if self.eviction is not None:
                self.eviction.recent = self.recent
        keep = 1.0 if visual is None else visual.keep
        shares = [keep ** (i + 1) if isinstance(keep, (int, float)) else keep for i in range(len(layers))]
        self.visual_stages = dict(zip(layers, shares, strict=True))
        self.stages = {**self.visual_stages, **self.stages}
        asks = frozenset() if visual is None or 0 not in layers else visual.needs.visual
        self.tower = TowerWatch(vlm, asks, self.clock, tower)
        self._hands_on = tower is not None and not tower.unmerge
        self._finds_images = self._hands_on or bool(self.visual_stages)
        self.features = FeatureWatch(vlm, self.tower)
        self.images: list[Image] = []
        """The images and videos of the last prompt, each with the plan for its tokens."""
        self._outer = inspect.signature(vlm.base.forward)
        self._special = special_ids(vlm)
        self._call: dict[str, Any] = {}
        self._turn = threading.RLock()

    def _stats(self) -> VisualStats:
        methods = self.asked.values()
        return VisualStats(
            mode=self.mode,
            reducer=" + ".join(map(repr, methods)) or "nothing merged",
            evictor="" if self.eviction is None else repr(self.eviction.evictor),
            reducer_bytes=sum(method.weights_bytes for method in methods),
        )

    @property
    def columns(self) -> Tensor | None:
        """``(B, K)`` long: the prompt's column at which each of the last hidden states stands, -1 for padding."""
        return None if self.plan is None else torch.where(self.plan.valid, self.plan.position, -1)

    # Attaching --------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        super()._attach()
        self._undo.extend(self.tower.attach())
        if self._finds_images:
            self._undo.extend(self.features.attach())
        if self.tower_run is not None:
            self._undo.append(self.tower_run.detach)
            self.tower_run.attach()
        self._turn = threading.RLock()
        self._note(self.vlm.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        self._note(self.vlm.base.register_forward_hook(self._after_base, always_call=True))

    def _around_generate(self, given: dict[str, Any], call: Callable[[], Any]) -> Any:
        # It asks the tower for features in front of any forward, in some releases.
        with self._turn:
            return super()._around_generate(given, call)

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(self._outer.bind_partial(*args, **kwargs).arguments)
        inputs.update(inputs.pop("kwargs", {}))
        # What the tower tells of images is noted on the run, for one forward at a time: threads take turns.
        self._turn.acquire()
        self._turns += 1
        self._call = inputs
        self.features.start()

    def _after_base(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._turns:
            return  # it failed before its turn
        self._call = {}
        self.features.start()
        self._turns -= 1
        self._turn.release()

    # Reading a prompt -------------------------------------------------------------------------------------------

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Shorten a prompt behind the projector, or fit what is read after one to its cache."""
        embeds = inputs.get("inputs_embeds")
        embeds = inputs["input_ids"] if embeds is None else embeds
        # Some models make the masks themselves, in front of their language model; the one that was given is meant.
        made = inputs.get("attention_mask")
        mask = self._call.get("attention_mask") if self._call and is_made(made) else made
        see = None if prompt else self._seen(mask, embeds.shape[1])
        if see is not None:
            return self._read_tree(inputs, embeds, see)
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise QuickmergeError("attention_mask must be a 2-D padding mask inside a quickmerge run, got another kind")
        own = is_made(made) and made is not mask
        if not prompt:
            if own and both_ways(made):
                raise UnsupportedModelError(
                    f"{self._name} lets the tokens of an image see one another both ways, and an image of a later turn "
                    "can't be read like that behind a shortened prompt: begin anew, with all images in the first one"
                )
            further = self._read_on(inputs, embeds, mask, self._call.get("position_ids"))
            state = None if self._now is None else self._now.state
            if own and isinstance(state, VisualPrompt) and state.shortened:
                further.setdefault("attention_mask", None)
            return further
        cache = given_cache(inputs)
        check_fillable(cache)
        shape, device = embeds.shape[:2], embeds.device
        valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
        if valid.shape != shape:
            raise QuickmergeError(f"attention_mask must be {tuple(shape)}, got {tuple(valid.shape)}")
        ids = self._call.get("input_ids", inputs.get("input_ids"))
        # What has to be known on the host, by one wait.
        asks = self.reducers or self.eviction is not None
        stands = inputs.get("position_ids") if asks else None
        stands = stands if isinstance(stands, Tensor) and stands.ndim == 2 else None
        there, tokens, places = read(None if mask is None else valid, ids, stands)
        there = torch.ones(shape, dtype=torch.bool) if there is None else there
        self._check_side(there)
        if asks:
            check_padding(there)
            check_one_text({**inputs, "position_ids": places}, there, cache is not None)
        if own and both_ways(made) and (above := [layer for layer in self.stages if layer > 0]):
            raise UnsupportedModelError(
                f"layer must be 0 for {self._name}, got {above}: it lets the tokens of an image see one another both "
                "ways, by masks that are made in front of its language model"
            )
        self._check_lower(inputs)
        finds = bool(self._call) and self._finds_images
        images = read_images(self.vlm, self._call, self.features, embeds, tokens) if finds else []
        text = [] if tokens is None or not images else instruction(tokens, there, self._special, images)
        stats, length = self.stats, valid.sum(-1)
        state = VisualPrompt(
            stats, width=shape[1], valid=valid, masked=mask is not None,
            recount=self.positions == "consecutive",
        )  # fmt: skip
        seen = torch.zeros_like(there)
        for image in images:
            seen[image.row, image.columns] = True
        each, fixed = tuple(there.sum(-1).tolist()), tuple((there & ~seen).sum(-1).tolist())
        call = VisualCall(
            True, state, valid, valid & ~onto(seen, device), length=length, images=images, text=text,
            places=torch.arange(shape[1], device=device).expand(shape), ids=ids, given=length,
        )  # fmt: skip
        call.lengths = each
        call.beginning = Known(each, fixed, (0,) * len(each), each, tuple(there[:, -1].tolist()))
        self._now, self.images = call, images
        stats.rows, stats.tokens_in = shape[0], float(there.sum(-1).float().mean())
        stats.images = len(images)
        stats.visual_in = sum(image.count for image in images) / shape[0]
        if not self._finds_images and ids is not None:
            kinds = [self.vlm.token(kind) for kind in KINDS]
            assert tokens is not None
            stats.visual_in = sum(int((tokens == token).sum()) for token in kinds if token is not None) / shape[0]
        stats.visual_kept = stats.visual_in
        if self.tower_run is not None and stats.visual_in:
            stats.tower_tokens = self.tower_run.summary().tokens_per_block
        stats.tower_seconds, stats.reducer_seconds = self.tower.account()
        changed: dict[str, Any] = {}
        if (self._hands_on or 0 in self.visual_stages) and images:
            with torch.autocast(device.type, enabled=False):
                changed = self._shorten(inputs, embeds, call, state, made if own else None)
        return {**changed, CALL: call}

    def _check_lower(self, inputs: dict[str, Any]) -> None:
        """Refuse to merge in front of a block that is still given features of the tower for its visual tokens."""
        lowest, below = lowest_block(inputs), [layer for layer in self.stages if layer > 0]
        if below and min(below) < lowest:
            raise UnsupportedModelError(
                f"layer must be 0 or from {lowest} for {self._name}, got {min(below)}: blocks below that are given "
                "features of the vision tower for each visual token"
            )
        if below and (handed := further_arguments(inputs)):
            raise UnsupportedModelError(
                f"layer must be 0 for {self._name}, got {below}: its blocks are given more of each token than its "
                f"hidden state ({', '.join(handed)})"
            )

    def _shorten(
        self, inputs: dict[str, Any], embeds: Tensor, call: VisualCall, state: VisualPrompt, masks: Any
    ) -> dict[str, Any]:
        view, segment = self._view(call, 0, embeds, None), None
        decision = hand_on(view, call.images) if self._hands_on else None
        plan = MergePlan.identity(view) if decision is None else decision.plan
        if decision is not None and self.tower_run is not None:
            call.follow_text(plan)
            segment = Segment.of(plan, None, self.tower_run.reducer.proportional)
            view = self._view(call, 0, decision.hidden, segment)
        then = self._decide_visual(call, 0, view) if 0 in self.visual_stages else None
        if then is not None:
            segment = Segment.of(then.plan, segment, self.reducer.proportional)
            if decision is not None:
                then = Decision(plan.compose(then.plan), then.hidden, decision.seat.gather(1, then.seat))
            decision, plan = then, then.plan
        call.decide(0, plan)
        if decision is None or segment is None:
            return {}
        plan, seat = decision.plan, decision.seat
        positions = inputs.get("position_ids")
        changed: dict[str, Any] = {"inputs_embeds": decision.hidden}
        were = call.places if positions is None else positions
        state.true_position = next_positions(were, call.valid)
        if self.positions == "kept":
            state.next_position = state.true_position
            changed["position_ids"] = pick_columns(were, seat)
        elif positions is not None:
            count = plan.valid.long().cumsum(-1)
            state.next_position = count[:, -1]
            changed["position_ids"] = torch.where(plan.valid, count - 1, 0)
        changed |= shorter_arguments(self._name, inputs, plan, seat)
        # Without any mask, jumps in the positions would be taken for the seams of packed texts.
        changed["attention_mask"] = plan.valid.long()
        if masks is not None and both_ways(masks):
            types = getattr(self.decoder.config, "layer_types", None) or []
            windows = dict(zip(types, self.decoder.windows, strict=False))
            changed["attention_mask"] = shorter_masks(self._name, masks, seat, plan.valid, windows)
        state.masked = state.masked or any(count != plan.slots for count in plan.counted().counts or ())
        call.valid = state.valid = plan.valid
        call.places, call.source[0] = plan.position, seat
        call.segments[0] = state.segments[0] = segment
        state.seats = plan.position
        return changed

    def _resume(self, cache: Cache, rows: int) -> VisualPrompt:
        state = super()._resume(cache, rows)
        if not isinstance(state, VisualPrompt):
            raise QuickmergeError(f"{cache_name()} was filled by a language model alone; start it with an empty cache")
        return state

    # Deciding ---------------------------------------------------------------------------------------------------

    def _view(self, call: VisualCall, index: int, hidden: Tensor, below: Segment | None) -> TokenView:
        """The sequence in front of block ``index``, all but its visual tokens protected."""
        valid = call.valid if below is None else below.valid
        return TokenView(
            hidden=hidden,
            valid=valid,
            protected=valid & ~call.visual(valid),
            position=call.places if below is None else below.position,
            size=None if below is None else below.size,  # type: ignore[arg-type]
            length=call.length,  # type: ignore[arg-type]
            evidence=Evidence(layer=index, depth=len(self.decoder)),
            known=call.beginning if below is None and index == 0 else None,
        )

    def _decide_visual(self, call: VisualCall, index: int, view: TokenView) -> Decision | None:
        """Reduce the visual tokens in front of block ``index``; None if all stay."""
        began = self.clock()
        trace, asks = call.traces.get(index - 1), self.reducer.needs.visual
        told = told_by_tower if index == 0 else told_inside(trace, view, call.visual(view.valid), asks)
        reducer = replace(self.reducer, keep=self.visual_stages[index])
        decision = decide(reducer, view, call.images, call.text, told)
        if decision is not None:
            call.follow_text(decision.plan)
        self.stats.reducer_seconds += self.clock() - began
        return decision

    def _merge(self, call: PrefixCall, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        assert isinstance(call, VisualCall)
        if index == 0:
            return hidden  # done in front of the decoder
        if index in self.reducers:
            if call.whole is None:
                self._protect(call, index)
            return super()._merge(call, index, hidden, kwargs)
        if index in call.plans:
            raise QuickmergeError(
                "gradient checkpointing must be off where visual tokens are merged inside the language model, with a "
                "transformers before 5.24: there a block is hooked again when it is computed again"
            )
        decision = None
        if call.images:
            view = self._view(call, index, hidden, call.segment(index - 1))
            decision = self._decide_visual(call, index, view)
            call.decide(index, MergePlan.identity(view) if decision is None else decision.plan)
        call.forget_below(index)  # with images or without: a batch is read as its rows are
        if decision is None:
            return hidden
        self._begin_segment(call, index, decision.plan, call.places, call.valid.shape[1], self.reducer.proportional)
        return decision.hidden

    def _protect(self, call: VisualCall, index: int) -> None:
        """Find what is to stay alone of the tokens that the merges of visual tokens have left in front of a block."""
        below = call.segment(index - 1)
        valid, places = (call.valid, call.places) if below is None else (below.valid, below.position)
        kept = self._protection(valid, self._ids(call, index))
        width = call.valid.shape[1] if call.plan is None else call.plan.slot.shape[1]

        def given(mask: Tensor) -> Tensor:
            # A padding slot stands nowhere.
            marks = torch.zeros(len(mask), width, dtype=torch.long, device=mask.device)
            return marks.scatter_add(1, places, (mask & valid).long()) > 0

        call.protected, call.exempt, call.asked = given(kept.protected), given(kept.exempt), given(kept.asked)
        call.length = valid.sum(-1)
        call.whole = self._whole(call.length, kept.protected)

    def _ids(self, call: PrefixCall, index: int) -> Tensor | None:
        assert isinstance(call, VisualCall)
        below = call.segment(index - 1)
        return None if call.ids is None else call.ids.gather(1, call.places if below is None else below.position)

    def _probed(self, call: PrefixCall, layer: int) -> bool:
        below = layer + 1 in self.visual_stages and layer + 1 not in call.plans
        asked = below and bool(self.reducer.needs.visual & {"attention", "norm", "key"})
        return asked or super()._probed(call, layer)

    # Afterwards -------------------------------------------------------------------------------------------------

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        call = self._now
        if isinstance(call, VisualCall) and call.fresh and self._finds_images and not stands_aside():
            self.stats.visual_kept = sum(image.left for image in call.images) / max(1, self.stats.rows)
        super()._after_model(module, args, kwargs, output)

    def forget(self) -> None:
        """Drop prompts and what was measured; the images' plans and statistics stay for the summary."""
        super().forget()
        self._call = {}
        self.tower.forget()
        self.features.forget()


def is_made(mask: Any) -> bool:
    """Whether a mask is more than one of padding: what each token sees, or that for each type of block."""
    return isinstance(mask, Mapping) or (isinstance(mask, Tensor) and mask.ndim == 4)


def told_by_tower(image: Image) -> Seen | None:
    """What the tower told of an image: of its tokens that are there, where some went with a merge in the tower."""
    return image.seen if image.seen is None or image.plan is None else image.seen.at(image.plan.position[0])
