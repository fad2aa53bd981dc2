"""Prefix mode: the residual stream of a known prompt is merged at one or several depths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache

from quickmerge.errors import PromptTooShortError, QuickmergeError
from quickmerge.hosts.attention import AttentionFunction, proportional_attention
from quickmerge.hosts.causal_lm import Run
from quickmerge.hosts.protection import Protection, protection, special_tokens
from quickmerge.hosts.segment import Segment
from quickmerge.hosts.structure import Decoder
from quickmerge.models.compat import DynamicLayer, DynamicSlidingWindowLayer, cache_name, given_cache
from quickmerge.reducers.base import Reducer
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.saliency import AttentionTrace
from quickmerge.tokens.schedule import Schedule
from quickmerge.tokens.view import TokenView


@dataclass
class Prompt:
    """One prompt that was read: its tokens, and the segments its merges made, by first block."""

    valid: Tensor
    protected: Tensor
    length: Tensor
    exempt: Tensor | None = None
    segments: dict[int, Segment] = field(default_factory=dict)
    plan: MergePlan | None = None


class PrefixRun(Run):
    """See `quickmerge.reduce`. Only the forward that fills an empty cache is merged; what follows is read in full."""

    mode = "prefix"
    shares = True

    def __init__(
        self,
        decoder: Decoder,
        reducer: Reducer,
        schedule: Schedule | None,
        *,
        sinks: int = 0,
        recent: int = 0,
        protect: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(decoder, reducer)
        self.schedule = schedule
        stages = [] if schedule is None else schedule.stages(reducer.keep, len(decoder))
        self.stages = {s.layer: s.keep for s in stages}
        self.sinks, self.recent, self.protect = sinks, recent, protect
        self._prompts: WeakKeyDictionary[Cache, Prompt] = WeakKeyDictionary()
        self._prompt: Prompt | None = None
        self._traces: dict[int, AttentionTrace] = {}
        self._new: Tensor | None = None
        self._corrections: dict[int, Tensor] = {}
        self.plans: list[MergePlan] = []
        """The plan of each merge of the last prompt, from the lowest block up."""
        self.protected: Tensor | None = None
        """``(B, N)`` bool: the tokens of the last prompt that were kept out of merging."""
        self.composed: list[MergePlan] = []
        """The same merges, each composed with those below it: from the prompt's N tokens to slots."""

    @property
    def plan(self) -> MergePlan | None:
        """All merges of the last prompt composed: from its N tokens to the slots that the top block read."""
        return self.composed[-1] if self.composed else None

    @property
    def main_plan(self) -> MergePlan | None:
        """From the prompt's N tokens to the slots that most of the reduced blocks read."""
        if not self.composed:
            return None
        ends = [*list(self.stages)[1:], len(self.decoder)]
        blocks = [end - start for start, end in zip(self.stages, ends, strict=True)]
        return self.composed[blocks.index(max(blocks))]

    def _attach(self) -> None:
        super()._attach()
        self._note(self.decoder.model.register_forward_pre_hook(self._check_head, with_kwargs=True))

    def _check_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse a prompt that comes with drafted tokens: assisted decoding would have them merged into it."""
        cache, wanted = given_cache(kwargs), kwargs.get("logits_to_keep", 0)
        prompt = cache is None or cache.get_seq_length() == 0
        if prompt and (isinstance(wanted, Tensor) or wanted > 1):
            raise QuickmergeError(
                "logits_to_keep must be 0 or 1 while a prompt is merged, got another value: merged tokens have no "
                "logits of their own, and assisted decoding would have its drafts merged"
            )

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Note what is read: a prompt to merge, or more tokens after one that was merged here."""
        cache = given_cache(inputs)
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        mask = inputs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise QuickmergeError("attention_mask must be a 2-D padding mask inside a quickmerge run, got another kind")
        if not prompt:
            self._prompt = self._prompts.get(cache)
            if self._prompt is None:
                raise QuickmergeError(f"{cache_name()} was filled outside this run; start it with an empty cache")
            rows = len(self._prompt.valid)
            if rows != len(ids):
                raise QuickmergeError(f"{cache_name()} holds {rows} rows that were merged here, got {len(ids)} rows")
            fresh = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
            self._new = fresh if mask is None else mask[:, -ids.shape[1] :].bool()
            for segment in self._prompt.segments.values():
                segment.masks = {}
            return {}
        self._check_cache(cache)
        self._traces, self._corrections, self.plans, self.composed = {}, {}, [], []
        valid = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        if valid.shape != ids.shape[:2]:
            raise QuickmergeError(f"attention_mask must be {tuple(ids.shape[:2])}, got {tuple(valid.shape)}")
        kept = self._protect(valid, inputs.get("input_ids"))
        self._prompt = Prompt(valid, kept.protected, valid.sum(-1), kept.exempt)
        self.protected = kept.protected
        self.stats.rows, self.stats.tokens_in = len(valid), float(self._prompt.length.float().mean())
        return {}

    def _protect(self, valid: Tensor, ids: Tensor | None) -> Protection:
        """Sinks, the recent tokens, marks of the last turn, and what the user asked for; see `protection`."""
        count = valid.sum(-1, keepdim=True)
        runs = (valid[:, 1:] != valid[:, :-1]).sum(-1)
        if bool(((runs > 1) | ((runs == 1) & valid[:, 0] & valid[:, -1])).any()) or bool((count == 0).any()):
            raise QuickmergeError("attention_mask must pad on one side and leave tokens in every row, got holes")
        special = special_tokens(self.decoder.config)
        keep = protection(valid, ids, special, sinks=self.sinks, recent=self.recent, protect=self.protect)
        if bool((keep.protected.sum(-1) >= count[:, 0]).any()):
            least = int(count.min())
            raise PromptTooShortError(
                f"prompt must be longer than its protected tokens, got a row of {least} tokens that are all protected "
                f"(sinks={self.sinks}, recent={self.recent}, special tokens); lower these or give a longer text"
            )
        return keep

    def _check_cache(self, cache: Cache | None) -> None:
        for layer in cache.layers if cache is not None else ():
            # Other layers of ours may be there that hold every token too, as those of multipole attention.
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) and not getattr(layer, "is_whole", False):
                raise QuickmergeError(
                    f"{cache_name()} must be a DynamicCache inside a quickmerge run, got layers of type "
                    f"{type(layer).__name__}"
                )

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Keep references to what the next merge will ask for; add log(size) where the method wants it."""
        query, key, value = args[:3]
        if self._fresh and self._probed(layer):
            scaling = kwargs.get("scaling")
            scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
            self._traces[layer] = AttentionTrace(query, key, value, scaling, self.decoder.windows[layer])
        segment = self._segment(layer)
        if segment is None or not self.reducer.proportional:
            return call(module, *args, **kwargs)
        return proportional_attention(call, module, args, kwargs, segment.size[:, -key.shape[2] :])

    def _probed(self, layer: int) -> bool:
        """Whether a merge asks what the attention of this layer computed."""
        return any(stage - self.reducer.probes <= layer < stage for stage in self.stages)

    def _segment(self, layer: int) -> Segment | None:
        """The segment a block belongs to; None below the first merge and where merging changed nothing."""
        if self._prompt is None:
            return None
        below = [first for first in self._prompt.segments if first <= layer]
        return self._prompt.segments[max(below)] if below else None

    def _reads(self, layer: int) -> Segment | None:
        """The segment by which a block's arguments are changed; None leaves them as the model made them."""
        return self._segment(layer)

    def _places(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """``(B, q)``, where the tokens that enter the decoder stand in the original sequence."""
        places: Tensor = kwargs["position_ids"].expand(len(hidden), -1)
        return places

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        if index < min(self.stages):
            return None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._enter_block(index, args, kwargs)

        return hook

    def _enter_block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        prompt = self._prompt
        if prompt is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = given_cache(kwargs)
        places = self._places(hidden, kwargs)
        if self._fresh and index in self.stages:
            # A reducer computes as it always does, also where the model runs under autocast.
            with torch.autocast(hidden.device.type, enabled=False):
                hidden = self._merge(index, hidden, places, prompt)
            if cache is not None:
                self._prompts[cache] = prompt
        if self._fresh and index in self._corrections:
            hidden = hidden + self._corrections.pop(index).to(hidden.dtype)
        segment = self._reads(index)
        if segment is None:
            return None
        kwargs = dict(kwargs)
        if not self._fresh and index in prompt.segments:
            assert self._new is not None and cache is not None
            segment.extend(places, self._new, cache.get_seq_length(index))
        if self._fresh:
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = pick_columns(kwargs["position_ids"], segment.source)
            if kwargs.get("position_embeddings") is not None:
                kwargs["position_embeddings"] = tuple(
                    pick_columns(t, segment.source, -2) for t in kwargs["position_embeddings"]
                )
        kwargs["attention_mask"] = segment.mask(self.decoder, index, hidden, cache)
        if args:
            return (hidden, *args[1:]), kwargs
        kwargs["hidden_states"] = hidden
        return args, kwargs

    def _merge(self, index: int, hidden: Tensor, position_ids: Tensor, prompt: Prompt) -> Tensor:
        began = self.clock()
        below = self._segment(index - 1)
        wanted = [layer for layer in range(max(0, index - self.reducer.probes), index) if layer in self._traces]
        # A probe below an earlier merge saw more tokens than there are now, so it can't speak for them.
        traces = [self._traces[i] for i in wanted if self._traces[i].query.shape[2] == hidden.shape[1]]
        view = TokenView(
            hidden=hidden,
            valid=prompt.valid if below is None else below.valid,
            protected=prompt.protected if self.plan is None else self.plan.carry(prompt.protected),
            position=position_ids if below is None else below.position,
            size=None if below is None else below.size,  # type: ignore[arg-type]
            exempt=prompt.exempt if self.plan is None or prompt.exempt is None else self.plan.carry(prompt.exempt),
            length=prompt.length,
            attention=traces,
            layer=index,
        )
        plan = replace(self.reducer, keep=self.stages[index]).plan(view)
        # Where every token stays alone, hidden states and the block's own arguments are left as they are, padding
        # and all, so keep=1 is the model bit for bit.
        same = bool((plan.valid.sum(-1) == view.valid.sum(-1)).all())
        plan = MergePlan.identity(view) if same else plan
        self.plans.append(plan)
        self.composed.append(plan if self.plan is None else self.plan.compose(plan))
        if not same:
            hidden = plan.merge(hidden)
            if index == min(self.stages):
                self._corrections = dict(self.reducer.align(view, plan))
            else:
                self._corrections = {block: plan.merge(added) for block, added in self._corrections.items()}
            prompt.segments[index] = Segment.from_plan(plan, position_ids, prompt.valid)
        self._traces = {layer: t for layer, t in self._traces.items() if layer >= index}
        self.stats.reducer_seconds += self.clock() - began
        return hidden

    def tokens_per_layer(self) -> list[float]:
        """Mean valid tokens per row that each block read of the prompt."""
        if self._prompt is None:
            return []
        counts = []
        for layer in range(len(self.decoder)):
            segment = self._segment(layer)
            valid = self._prompt.valid if segment is None else segment.valid
            counts.append(float(valid.sum(-1).float().mean()))
        return counts

    def forget(self) -> None:
        """Drop prompts and traces; plans and statistics stay for the summary."""
        self._prompts.clear()
        self._prompt, self._new, self._traces, self._corrections = None, None, {}, {}


def pick_columns(x: Tensor, source: Tensor, axis: int = -1) -> Tensor:
    """The columns ``source (B, K)`` of ``x``: columns lie along ``axis``, the rows, B or 1, along the axis before.

    ``(..., N, d)`` with axis -2, as rotary tables are, or ``(..., N)`` with axis -1, as positions are.
    """
    rows = axis - 1
    x = x.expand(*x.shape[:rows], len(source), *x.shape[rows + 1 :])
    index = source if axis == -1 else source[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(axis, index.expand(*x.shape[: x.ndim + rows], *index.shape))
