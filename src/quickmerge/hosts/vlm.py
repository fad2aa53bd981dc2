"""Running a vision-language model with fewer visual tokens inside a ``with`` block, and leaving it as it was."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.hosts.attention import check_free
from quickmerge.hosts.features import FeatureWatch
from quickmerge.hosts.prefix import PrefixRun, Prompt, pick_columns
from quickmerge.hosts.segment import Segment
from quickmerge.hosts.summary import VisualStats
from quickmerge.hosts.tower import TowerWatch
from quickmerge.hosts.tower_tokens import Seen
from quickmerge.hosts.visual import Image, instruction, read_images, special_ids
from quickmerge.hosts.visual_inside import told_inside
from quickmerge.hosts.visual_plan import Decision, decide
from quickmerge.hosts.visual_prompt import VisualPrompt, deepstack, next_positions
from quickmerge.hosts.vlm_structure import Vlm, find_vlm
from quickmerge.models.compat import cache_name, given_cache
from quickmerge.reducers.base import Reducer
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView

POSITIONS = ("kept", "consecutive")


def reduce_vlm(
    model: PreTrainedModel, reducer: Reducer, layer: int | Sequence[int] | None = None, *, positions: str = "kept"
) -> VlmRun:
    """Make a vision-language model read fewer visual tokens; see `quickmerge.hosts.reduce` for the arguments."""
    if not isinstance(reducer, Reducer):
        raise ValueError(f"reducer must be a quickmerge reducer such as SCOPE(keep=0.25), got {reducer!r}")
    if "vision" not in reducer.places or (reducer.probes and not reducer.asks):
        raise ValueError(
            f"reducer {reducer.name} ({type(reducer).__name__}) is not for visual tokens; those of "
            "`quickmerge.reducers.VISUAL_TOKEN_REDUCERS` are"
        )
    vlm = find_vlm(model, shared=True)
    check_free(model, vlm.decoder.attentions, VlmRun)
    depth = len(vlm.decoder)
    layers = (0,) if layer is None else tuple(layer) if isinstance(layer, Sequence) else (layer,)
    lowest = vlm.deepstack or 1
    whole = all(isinstance(x, int) and not isinstance(x, bool) and (x == 0 or lowest <= x < depth) for x in layers)
    if not layers or not whole or any(a >= b for a, b in pairwise(layers)):
        below = f", behind the blocks that are given features of the tower, as {vlm.name} does" if lowest > 1 else ""
        raise ValueError(
            f"layer must be 0 (behind the projector) or rising blocks in {lowest}..{depth - 1}{below}, got {layer!r}"
        )
    if positions not in POSITIONS:
        raise ValueError(f"positions must be one of {', '.join(POSITIONS)}, got {positions!r}")
    if positions == "consecutive" and vlm.family.mrope:
        raise ValueError(
            f"positions must be 'kept' for {type(model).__name__}, whose visual tokens have places in a grid, "
            f"got {positions!r}"
        )
    reducer.check(model, layers, "visual")
    return VlmRun(vlm, reducer, layers, positions=positions)


class VlmRun(PrefixRun):
    """See `quickmerge.reduce`. Only visual tokens are merged or dropped, in the forward that fills an empty cache."""

    mode = "visual"
    stats: VisualStats
    _prompt: VisualPrompt | None

    def __init__(self, vlm: Vlm, reducer: Reducer, layers: tuple[int, ...], *, positions: str) -> None:
        self.vlm, self.positions = vlm, positions
        super().__init__(vlm.decoder, reducer, None)
        keep = reducer.keep
        shares = [keep ** (i + 1) if isinstance(keep, (int, float)) else keep for i in range(len(layers))]
        self.stages = dict(zip(layers, shares, strict=True))
        self.tower = TowerWatch(vlm, reducer.asks if 0 in layers else frozenset(), self.clock)
        self.features = FeatureWatch(vlm, self.tower)
        self.images: list[Image] = []
        """The pictures and videos of the last prompt, each with the plan for its tokens."""
        self._outer = inspect.signature(vlm.base.forward)
        self._special = special_ids(vlm)
        self._call: dict[str, Any] = {}
        self._new_places: Tensor | None = None

    def _stats(self) -> VisualStats:
        return VisualStats(mode=self.mode, reducer=repr(self.reducer), reducer_bytes=self.reducer.weights_bytes)

    @property
    def columns(self) -> Tensor | None:
        """``(B, K)`` long: the prompt's column at which each of the last hidden states stands, -1 for padding."""
        return None if self.plan is None else torch.where(self.plan.valid, self.plan.position, -1)

    # Attaching --------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        super()._attach()
        self._undo.extend(self.tower.attach())
        self._undo.extend(self.features.attach())
        self._note(self.vlm.base.register_forward_pre_hook(self._before_base, with_kwargs=True))
        self._note(self.vlm.base.register_forward_hook(self._after_base))

    def _check_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._check_head(module, args, kwargs)
        if kwargs.get("labels") is not None:
            raise QuickmergeError(
                "labels must be left out inside a quickmerge run, since there are logits for fewer tokens than there "
                "are labels; take logits by the run's columns"
            )

    def _before_base(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = dict(self._outer.bind_partial(*args, **kwargs).arguments)
        inputs.update(inputs.pop("kwargs", {}))
        self._call = inputs
        self.features.start()

    def _after_base(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._call = {}
        self.features.start()

    # Reading a prompt -------------------------------------------------------------------------------------------

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Shorten a prompt behind the projector, or fit what is read after one to its cache."""
        mask, embeds = inputs.get("attention_mask"), inputs.get("inputs_embeds")
        embeds = inputs["input_ids"] if embeds is None else embeds
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise QuickmergeError("attention_mask must be a 2-D padding mask inside a quickmerge run, got another kind")
        if not prompt:
            return self._read_on(inputs, embeds, mask)
        cache = given_cache(inputs)
        self._check_cache(cache)
        self._traces, self.plans, self.composed = {}, [], []
        shape, device = embeds.shape[:2], embeds.device
        valid = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask.bool()
        if valid.shape != shape:
            raise QuickmergeError(f"attention_mask must be {tuple(shape)}, got {tuple(valid.shape)}")
        self.images = read_images(self.vlm, self._call, self.features) if self._call else []
        visual = torch.zeros_like(valid)
        for image in self.images:
            visual[image.row, image.columns] = True
        ids = self._call.get("input_ids")
        text = [] if ids is None or not self.images else instruction(ids, valid, self._special, self.images)
        places = torch.arange(shape[1], device=device).expand(shape)
        self.protected = valid & ~visual
        self._prompt = VisualPrompt(
            valid, self.protected, valid.sum(-1), width=shape[1], places=places, images=self.images, text=text,
            masked=mask is not None,
        )  # fmt: skip
        self.stats.rows, self.stats.tokens_in = shape[0], float(self._prompt.length.float().mean())
        self.stats.images = len(self.images)
        self.stats.visual_in = sum(image.count for image in self.images) / shape[0]
        self.stats.tower_seconds, self.stats.reducer_seconds = self.tower.account()
        if cache is not None:
            self._prompts[cache] = self._prompt
        if 0 not in self.stages or not self.images:
            return {}
        with torch.autocast(device.type, enabled=False):
            return self._shorten(inputs, embeds, self._prompt)

    def _shorten(self, inputs: dict[str, Any], embeds: Tensor, prompt: VisualPrompt) -> dict[str, Any]:
        decision = self._decide(0, embeds, prompt)
        if decision is None:
            return {}
        plan, seat = decision.plan, decision.seat
        positions = inputs.get("position_ids")
        changed: dict[str, Any] = {"inputs_embeds": decision.hidden}
        were = prompt.places if positions is None else positions
        prompt.true_position = next_positions(were, prompt.valid)
        if self.positions == "kept":
            prompt.next_position = prompt.true_position
            changed["position_ids"] = pick_columns(were, seat)
        elif positions is not None:
            count = plan.valid.long().cumsum(-1)
            prompt.next_position = count[:, -1]
            changed["position_ids"] = torch.where(plan.valid, count - 1, 0)
        if inputs.get("deepstack_visual_embeds") is not None:
            changed |= deepstack(plan, inputs["visual_pos_masks"], inputs["deepstack_visual_embeds"])
        # Without any mask, jumps in the positions would be taken for the seams of packed texts.
        changed["attention_mask"] = plan.valid.long()
        prompt.masked = prompt.masked or not bool(plan.valid.all())
        prompt.valid, prompt.places = plan.valid, plan.position
        prompt.segments[0] = Segment(
            plan, seat, plan.position, plan.valid, plan.size, padded=not bool(plan.valid.all())
        )
        return changed

    def _read_on(self, inputs: dict[str, Any], embeds: Tensor, mask: Tensor | None) -> dict[str, Any]:
        cache = given_cache(inputs)
        found = self._prompts.get(cache)
        if not isinstance(found, VisualPrompt):
            raise QuickmergeError(f"{cache_name()} was filled outside this run; start it with an empty cache")
        self._prompt = prompt = found
        rows, new = embeds.shape[:2]
        if len(prompt.valid) != rows:
            raise QuickmergeError(
                f"{cache_name()} holds {len(prompt.valid)} rows that were merged here, got {rows} rows"
            )
        given = self._call.get("position_ids")
        changed, self._new, self._new_places = prompt.follow(
            int(cache.get_seq_length()), new, mask, given, recount=self.positions == "consecutive"
        )
        return changed

    # Deciding ---------------------------------------------------------------------------------------------------

    def _decide(self, index: int, hidden: Tensor, prompt: VisualPrompt) -> Decision | None:
        """Reduce the visual tokens in front of block ``index``; None if all stay."""
        began = self.clock()
        below = self._segment(index - 1)
        visual = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        for image in prompt.images:
            visual[image.row, image.now] = True
        valid = prompt.valid if below is None else below.valid
        view = TokenView(
            hidden=hidden, valid=valid, protected=valid & ~visual,
            position=prompt.places if below is None else below.position,
            size=None if below is None else below.size,  # type: ignore[arg-type]
            length=prompt.length, layer=index, depth=len(self.decoder),
        )  # fmt: skip
        told = (
            told_by_tower if index == 0 else told_inside(self._traces.get(index - 1), view, visual, self.reducer.asks)
        )
        reducer = replace(self.reducer, keep=self.stages[index])
        decision = decide(reducer, view, prompt.images, prompt.text, told)
        plan = MergePlan.identity(view) if decision is None else decision.plan
        self.plans.append(plan)
        self.composed.append(plan if self.plan is None else self.plan.compose(plan))
        if decision is not None:
            prompt.text = [plan.slot[row, columns] for row, columns in enumerate(prompt.text)]
        self._traces = {layer: t for layer, t in self._traces.items() if layer >= index}
        self.stats.reducer_seconds += self.clock() - began
        return decision

    def _merge(self, index: int, hidden: Tensor, places: Tensor, prompt: Prompt) -> Tensor:
        assert isinstance(prompt, VisualPrompt)
        decision = self._decide(index, hidden, prompt) if prompt.images else None
        if decision is None:
            return hidden
        prompt.segments[index] = Segment.from_plan(decision.plan, places, prompt.valid)
        return decision.hidden

    def _probed(self, layer: int) -> bool:
        return layer + 1 in self.stages and bool(self.reducer.asks & {"attention", "norm", "key"})

    def _reads(self, layer: int) -> Segment | None:
        # Behind the projector the model itself makes masks and rotary tables for what it is given.
        segment = self._segment(layer)
        assert self._prompt is not None
        return None if segment is self._prompt.segments.get(0) else segment

    def _places(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        assert self._prompt is not None
        if self._fresh:
            return self._prompt.places
        assert self._new_places is not None
        return self._new_places

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        inside = [layer for layer in self.stages if layer]
        return super()._block_hook(index) if inside and index >= min(inside) else None

    # Afterwards -------------------------------------------------------------------------------------------------

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        super()._after_model(module, args, kwargs, output)
        if self._fresh and self._prompt is not None:
            self.stats.visual_kept = sum(image.left for image in self.images) / max(1, self.stats.rows)
            if self._cache is not None:
                self._prompts[self._cache] = self._prompt

    def tokens_read(self, cache: Cache) -> int:
        """How many tokens the cache would hold in every layer if none had been merged."""
        gone = 0 if self._prompt is None else self._prompt.width - self._prompt.valid.shape[1]
        return super().tokens_read(cache) + gone

    def forget(self) -> None:
        """Drop prompts and what was measured; the pictures' plans and statistics stay for the summary."""
        super().forget()
        self._call, self._new_places = {}, None
        self.tower.forget()
        self.features.forget()


def told_by_tower(image: Image) -> Seen | None:
    """What the tower told of a picture."""
    return image.seen
