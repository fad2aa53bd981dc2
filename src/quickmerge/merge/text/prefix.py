"""Prefix mode: the residual stream of a known prompt is merged at one or several depths.

What a forward finds out travels with it: an object of its own goes along with the arguments of the decoder, its blocks
and their attention. So several threads may read at once, and a block that gradient checkpointing computes again, in
whatever thread, finds what was decided when it was computed first. What is left when a prompt was read belongs to its
cache; see `quickmerge.merge.text.merged_cache`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.baselines import Uniform
from quickmerge.merge.run import Run, RunStats
from quickmerge.merge.text.block_call import BlockArguments, Slots, in_streams, one_stream
from quickmerge.merge.text.blocks import check_blocks, trace_of
from quickmerge.merge.text.drafts import apart, joined
from quickmerge.merge.text.eviction import Again, Eviction
from quickmerge.merge.text.merged_cache import (
    PromptState,
    Segment,
    check_fillable,
    columns_at,
    expect,
    extend_heads,
    fill,
    rows_in,
    state_of,
    tables_of,
)
from quickmerge.merge.text.modes import Prefix
from quickmerge.merge.text.prefix_call import CALL, PrefixCall, Reading
from quickmerge.merge.text.rows import (
    Protection,
    Told,
    check_one_text,
    check_padding,
    plan_rows,
    protection,
    special_tokens,
)
from quickmerge.merge.tokens.budget import Schedule
from quickmerge.merge.tokens.plan import MergePlan, anchors_of
from quickmerge.merge.tokens.view import Evidence, Known, TokenView
from quickmerge.models.attachment import PerThread, by_name, setting, stands_aside, uncounted, watch_generate
from quickmerge.models.compat import cache_argument, cache_name, given_cache, reshapes_output, returned_cache
from quickmerge.models.decoder import AttentionFunction, Decoder, proportional_attention
from quickmerge.models.literals import literal_mask
from quickmerge.models.moved import onto, read
from quickmerge.models.spans import spans, tokenizer_of, within


class PrefixRun(Run):
    """See `quickmerge.reduce`. Only the forward that fills an empty cache is merged; what follows is read in full."""

    mode = "prefix"
    shares = True
    shortens = False
    """Whether it reads on behind prompts that became shorter in front of the first block."""
    _now: PerThread[PrefixCall | None] = PerThread(lambda: None)
    _own: PerThread[Reading | None] = PerThread(lambda: None)
    _generating = PerThread(bool)
    _again: PerThread[Again | None] = PerThread(lambda: None)
    _drafts = PerThread(int)
    _steady = PerThread(bool)
    """Whether ``generate`` goes on by itself with a text of which it has read something here."""

    def __init__(
        self,
        decoder: Decoder,
        reducer: Reducer | None,
        schedule: Schedule | None,
        mode: Prefix | None = None,
        cache: Evictor | None = None,
    ) -> None:
        recent = 1 if mode is None else mode.recent
        self.eviction = None if cache is None else Eviction(decoder, cache, recent)
        """What makes the cache smaller when a prompt has been read."""
        self._merges = reducer is not None
        super().__init__(decoder, Uniform(keep=1.0) if reducer is None else reducer)
        name = type(decoder.model).__name__
        self.blocks = [
            BlockArguments(block, traits, name) for block, traits in zip(decoder.layers, decoder.traits, strict=True)
        ]
        self._counting = next((t.entries for t in decoder.traits if t.entries is not None and not t.shares), None)
        """The layer of the cache that tells how much of a text has been read."""
        self._hands = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(decoder.base.forward).parameters.values())
        self._reshapes = reshapes_output(decoder.base)
        self._place(self.reducer, schedule, mode)
        self._latest = Reading()
        self._head = inspect.signature(decoder.model.forward)

    def _place(self, reducer: Reducer, schedule: Schedule | None, mode: Prefix | None) -> None:
        """Set what is done to all tokens of a prompt, and what stays alone."""
        self.schedule = schedule
        stages = [] if schedule is None else schedule.stages(reducer.keep, len(self.decoder))
        check_blocks(self.decoder, [stage.layer for stage in stages])
        self.stages = {s.layer: s.keep for s in stages}
        self.reducers = {s.layer: replace(reducer, keep=s.keep) for s in stages}
        """By block the method that merges a prompt as a whole in front of it, with its ``keep`` there."""
        # Without settings, as for visual tokens, nothing stays alone for where it stands.
        self.sinks, self.recent, self.protect, self.min_tokens = (
            (0, 0, (), 0) if mode is None else (mode.sinks, mode.recent, mode.masks, mode.min_tokens)
        )
        self.tokenizer = None if mode is None else mode.tokenizer
        self.keeps_literals = mode is not None and mode.keeps_literals
        evictor = None if self.eviction is None else self.eviction.evictor
        self.holds_literals = evictor is not None and evictor.protect is not None
        """Whether their entries stay in the cache, whatever is merged."""
        if (self.keeps_literals or self.holds_literals) and self._tokenizer() is None:
            raise QuickmergeError(
                f"tokenizer must be given for protect='literals', since none is known of "
                f"{type(self.decoder.model).__name__}: quickmerge.reduce(..., tokenizer=...)"
            )
        unit = reducer.needs.spans if stages else None
        if unit not in (None, "auto") and self._tokenizer() is None:
            raise QuickmergeError(
                f"tokenizer must be given for spans={unit!r}, since none is known of "
                f"{type(self.decoder.model).__name__}: quickmerge.reduce(..., tokenizer=...)"
            )

    def _tokenizer(self) -> Any:
        """What tells the text of the model's tokens: what the mode was given, or what is known of the model."""
        return tokenizer_of(self.decoder.model) if self.tokenizer is None else self.tokenizer

    def _stats(self) -> RunStats:
        stats = super()._stats()
        if not self._merges:
            stats.reducer = "nothing merged"
        stats.evictor = "" if self.eviction is None else repr(self.eviction.evictor)
        return stats

    # What was decided -------------------------------------------------------------------------------------------

    @property
    def _reading(self) -> Reading:
        """Of this thread's last prompt; of the last one of all, if this thread has read none."""
        return self._latest if self._own is None else self._own

    @property
    def plans(self) -> list[MergePlan]:
        """The plan of each merge of the last prompt, from the lowest block up."""
        return list(self._reading.plans)

    @property
    def merges(self) -> dict[int, MergePlan]:
        """The same plans by the block in front of which they were carried out; 0 is behind a projector."""
        return dict(zip(self._reading.layers, self._reading.plans, strict=True))

    @property
    def composed(self) -> list[MergePlan]:
        """The same merges, each composed with those below it: from the prompt's N tokens to slots."""
        return list(self._reading.composed)

    @property
    def protected(self) -> Tensor | None:
        """``(B, N)`` bool: the tokens of the last prompt that were kept out of merging."""
        return self._reading.protected

    @property
    def plan(self) -> MergePlan | None:
        """All merges of the last prompt composed: from its N tokens to the slots that the top block read."""
        composed = self._reading.composed
        return composed[-1] if composed else None

    @property
    def main_plan(self) -> MergePlan | None:
        """From the prompt's N tokens to the slots that most of the reduced blocks read."""
        composed, starts = self._reading.composed, self._reading.layers
        if not composed:
            return None
        ends = [*starts[1:], len(self.decoder)]
        blocks = [end - start for start, end in zip(starts, ends, strict=True)]
        return composed[blocks.index(max(blocks))]

    # Attaching --------------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        super()._attach()
        model = self.decoder.model
        if self.keeps_literals or self.holds_literals or any(r.needs.spans for r in self.reducers.values()):
            self._tokenizer()  # read now, where nobody looks at the clock
        self._note(model.register_forward_pre_hook(self._check_head, with_kwargs=True))
        self._undo.append(watch_generate(model, self._around_generate))
        if self._reshapes:
            self._note(self.decoder.layers[-1].register_forward_hook(self._widen, with_kwargs=True))

    def _around_generate(self, given: dict[str, Any], call: Callable[[], Any]) -> Any:
        """Refuse what ``generate`` can't do inside, by the name of the argument."""
        chunk = setting(self.decoder.model, given, "prefill_chunk_size")
        if chunk is not None:
            raise QuickmergeError(
                f"prefill_chunk_size must be left out inside a quickmerge run, which merges a prompt as a whole, "
                f"got {chunk}"
            )
        outer, self._generating, self._steady = (self._generating, self._steady), True, False
        try:
            return call()
        finally:
            self._generating, self._steady = outer

    def _check_head(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Refuse labels, which merged tokens have no logits for, and tell the decoder of tokens behind a prompt."""
        if stands_aside():
            return None
        given = by_name(self._head, args, kwargs)
        self._drafts = 0
        if given.get("labels") is not None:
            raise QuickmergeError(
                "labels must be left out inside a quickmerge run, since there are logits for fewer tokens than there "
                "are labels; take logits by the run's plan"
            )
        cache, wanted = given_cache(given), given.get("logits_to_keep", 0)
        if cache is not None and cache.get_seq_length() > 0:
            return None
        if isinstance(wanted, Tensor):
            raise QuickmergeError(
                "logits_to_keep must be a number while a prompt is merged, got a tensor: merged tokens have no logits "
                "of their own"
            )
        return self._tell_drafts(args, kwargs, int(wanted) - 1) if wanted > 1 else None

    def _tell_drafts(self, args: tuple[Any, ...], kwargs: dict[str, Any], drafts: int) -> Any:
        """Have the last tokens of a prompt, whose logits are asked for, read as what follows it."""
        self._drafts = drafts

    # Reading ----------------------------------------------------------------------------------------------------

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Note what is read: a prompt to merge, or more tokens after one that was read here or in another run."""
        cache, drafts, self._drafts = given_cache(inputs), self._drafts, 0
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        mask = inputs.get("attention_mask")
        see = None if prompt else self._seen(mask, ids.shape[1])
        if see is None and mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise QuickmergeError("attention_mask must be a 2-D padding mask inside a quickmerge run, got another kind")
        if not prompt:
            state = self._resume(cache, len(ids))
            new = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
            if see is None:
                new = new if mask is None else mask[:, -ids.shape[1] :].bool()
            call = PrefixCall(False, state, new, segments=dict(state.segments), see=see)
            call.whole_new, call.last_place = self._news(inputs, cache, None if see is not None else mask)
            return self._begun(call, inputs, cache)
        check_fillable(cache)
        valid = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device) if mask is None else mask.bool()
        if valid.shape != ids.shape[:2]:
            raise QuickmergeError(f"attention_mask must be {tuple(ids.shape[:2])}, got {tuple(valid.shape)}")
        told = Told.of(inputs, None if mask is None else valid, self.protect)
        check_padding(told.valid)
        check_one_text({**inputs, "position_ids": told.given}, told.valid, cache is not None)
        self._check_side(told.valid)
        drafts = min(drafts, ids.shape[1] - 1)
        now: dict[str, Tensor] = {}
        later: dict[str, Tensor] = {}
        if drafts and self._evicts(inputs):
            now, later = apart(inputs, drafts)
            valid, told, drafts = valid[:, :-drafts], told.without(drafts), 0
        call = self._prompt(valid, now.get("input_ids", inputs.get("input_ids")), drafts, told)
        call.later = later
        return {**now, **self._begun(call, {**inputs, **now}, cache)}

    def _begun(self, call: PrefixCall, inputs: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
        """Note the state of a forward that begins; returns the arguments by which it travels with it, where it can."""
        self._now = call
        given = inputs.get("position_ids")
        if isinstance(given, Tensor) and given.shape[-1] == call.valid.shape[1]:
            # Of positions along several axes the first is that of the text.
            call.places = given if given.ndim < 3 else given[0]
        else:
            read = 0 if cache is None else int(cache.get_seq_length())
            call.places = torch.arange(read, read + call.valid.shape[1], device=call.valid.device)[None]
        return {CALL: call} if self._hands else {}

    def _of_thread(self) -> PrefixCall | None:
        """The state of this thread's forward, where the model does not hand it on to its blocks."""
        if stands_aside():
            return None
        if self._now is not None and self._recomputes:
            raise UnsupportedModelError(
                f"gradient checkpointing must be off for {self._name}, whose blocks get no further arguments, so that "
                "what was decided can't travel with them"
            )
        return self._now

    def _news(self, inputs: dict[str, Any], cache: Cache | None, mask: Tensor | None) -> tuple[bool, int | None]:
        """Of tokens that are read behind a prompt whether all are valid, and where the last of any row stands.

        What ``generate`` gives once it has begun follows from what it gave before, and nobody has to look; nor where
        neither a mask nor positions are given. The place is None where it follows from the one before.
        """
        windows = any(self.decoder.windows)
        places = inputs.get("position_ids") if windows else None
        places = places if isinstance(places, Tensor) else None
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        if self._steady:
            return True, None
        there, stands = read(None if mask is None else mask.bool(), places)
        self._check_seam(there)
        whole = there is None or bool(there[:, -ids.shape[1] :].all())
        behind = 0 if cache is None else int(cache.get_seq_length())
        return whole, behind + ids.shape[1] - 1 if stands is None else int(stands.max())

    def _evicts(self, inputs: dict[str, Any]) -> bool:
        """Whether entries leave the cache that a prompt is about to fill."""
        used = inputs.get("use_cache")
        used = getattr(self.decoder.config, "use_cache", True) if used is None else used
        return self.eviction is not None and not self._recomputes and (used or given_cache(inputs) is not None)

    def _seen(self, mask: Any, new: int) -> Callable[[int], Tensor] | None:
        """What ``new`` tokens behind a prompt see of one another, by block, if a mask of four dimensions says it.

        Such a mask is over all columns read so far, as if nothing had been merged; or there is one for each type of
        block. What it says of columns that stand for a prompt is of account only below the first merge.
        """
        if isinstance(mask, Mapping):
            types = getattr(self.decoder.config, "layer_types", None) or []
            each = [mask[kind] for kind in types]
            return lambda layer: each[layer][..., -new:]
        if isinstance(mask, Tensor) and mask.ndim == 4:
            last = mask[..., -new:]
            return lambda layer: last
        return None

    def _check_side(self, valid: Tensor) -> None:
        if self._generating and not bool(valid[:, -1].all()):
            raise QuickmergeError(
                "attention_mask must pad on the left for generate, got padding on the right, behind which no text can "
                "go on: set the tokenizer's padding_side to 'left'"
            )

    def _check_seam(self, mask: Tensor | None) -> None:
        """Refuse to read on behind padding where a window is measured in columns, as models do."""
        if mask is None or not any(self.decoder.windows):
            return
        there = mask.bool()
        if bool((there[:, :-1] & ~there[:, 1:]).any()):
            raise QuickmergeError(
                "attention_mask must pad on the left where a model with sliding windows reads on behind a prompt, "
                "got padding in between, which would count as part of the window"
            )

    def _resume(self, cache: Cache, rows: int) -> PromptState:
        """What a filled cache knows, checked against what is read."""
        state = state_of(cache)
        if state is None:
            raise QuickmergeError(
                f"{cache_name()} was filled outside this run, and not in another one of prefix mode either; start it "
                "with an empty cache"
            )
        if state.short and not self.shortens:
            raise QuickmergeError(
                f"{cache_name()} holds a prompt that became shorter in front of the first block; go on with it in a "
                "run of such a reducer, or start with an empty cache"
            )
        held = rows_in(cache)
        if held != rows:
            raise QuickmergeError(f"{cache_name()} holds {held} rows that were merged here, got {rows} rows")
        tables = [t for i in range(len(cache.layers)) if (t := tables_of(cache, i)) is not None]
        if any(len(segment.valid) != rows for segment in state.segments.values()) or any(
            each.rows not in (None, rows) for each in tables
        ):
            raise QuickmergeError(
                f"{cache_name()} has layers whose rows were changed apart: pick, move or repeat rows of the whole cache"
            )
        self._counts = self._last = state.stats
        return state

    def _prompt(self, valid: Tensor, ids: Tensor | None, drafts: int, told: Told) -> PrefixCall:
        """The call that reads a prompt ``valid (B, N)`` and ``drafts`` tokens behind it, as they are told."""
        n, device = valid.shape[1] - drafts, valid.device
        drafts_whole, last_place = bool(told.valid[:, n:].all()), told.last(n)
        told = told.without(drafts)
        there = told.valid
        kept = self._protection(there, told.ids, told.asked)
        length = there.sum(-1)
        stats = self.stats
        stats.rows, stats.tokens_in = len(there), float(length.float().mean())
        # Behind padding the recent tokens are not the last entries.
        tail = min(self.recent, int(length.min()) - 1) if bool(there[:, -1].all()) else 0
        whole = self._whole(length, kept.protected)
        protected, exempt, marked = onto(torch.stack([kept.protected, kept.exempt, kept.asked]), device)
        counts, shut = onto(torch.stack([length, whole.long()]), device)
        fixed, extra = tuple(kept.protected.sum(-1).tolist()), tuple(kept.exempt.sum(-1).tolist())
        each, ends = tuple(length.tolist()), tuple(there[:, -1].tolist())
        known = Known(each, fixed, extra, each, ends)
        return PrefixCall(
            True, PromptState(stats, tail=tail), valid, protected, exempt, marked, counts,
            whole=shut.bool(), ids=None if ids is None else ids[:, :n], drafts=drafts, given=counts, known=known,
            kept_whole=tuple(whole.tolist()), reach=told.reach(kept.protected), drafts_whole=drafts_whole,
            last_place=last_place,
        )  # fmt: skip

    def _protection(self, valid: Tensor, ids: Tensor | None, asked: Sequence[Any] | None = None) -> Protection:
        """What of tokens ``valid (B, N)`` stays alone; it is counted where that is literals."""
        reads = self._tokenizer() if self.keeps_literals or self.holds_literals else None
        kept = protection(
            valid, ids, special_tokens(self.decoder.config), sinks=self.sinks, recent=self.recent,
            protect=self.protect, asked=asked, tokenizer=reads if self.keeps_literals else None,
        )  # fmt: skip
        if self.holds_literals and not self.keeps_literals:
            if ids is None:
                raise QuickmergeError("protect='literals' of the cache needs input_ids, and the model was called with "
                                      "inputs_embeds")  # fmt: skip
            literals = literal_mask(ids, valid, reads).to(valid.device)
            kept = replace(kept, asked=kept.asked | literals, literals=literals)
        if reads is not None:
            self.stats.literals = float(kept.literals.sum(-1).float().mean())
        return kept

    def _whole(self, length: Tensor, protected: Tensor) -> Tensor:
        """``(B,)`` bool, the rows that are not reduced, and count why: of ``length (B,)`` tokens some are protected."""
        short, shut = length < self.min_tokens, protected.sum(-1) >= length
        self.stats.min_tokens, self.stats.rows_short = self.min_tokens, int(short.sum())
        self.stats.rows_protected = int((shut & ~short).sum())
        return short | shut

    def _after_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if stands_aside():
            return
        call = self._now
        if call is not None and call.fresh:
            reading = Reading(tuple(call.plans), tuple(call.plans.values()), tuple(call.composed), call.protected)
            self._own = self._latest = reading
            if self._reshapes and call.segments:
                output.last_hidden_state = output.last_hidden_state[:, -call.tokens(len(self.decoder)) :]
            cache = returned_cache(output)
            cache = given_cache(kwargs) if cache is None else cache
            if self.eviction is not None and cache is not None and call.stands is not None:
                began = self.clock()
                self._evict(call, cache)
                self.stats.reducer_seconds += self.clock() - began
            if call.later:
                self._read_drafts(call, cache, output)
        super()._after_model(module, args, kwargs, output)
        self._now, self._steady = None, self._generating

    def _evict(self, call: PrefixCall, cache: Cache) -> None:
        """Make the cache of a prompt smaller, now that it has been read."""
        assert self.eviction is not None
        scores = call.scores
        if self.eviction.evictor.replays:
            with self._within(), torch.no_grad():
                scores = self.eviction.again(call, partial(self._read_again, cache), cache)
        self.eviction.finish(call, cache, scores)

    @contextmanager
    def _within(self) -> Iterator[None]:
        """Within the block forwards of the decoder are part of the one that has just ended, and aren't counted."""
        held = self._fresh, self._began, self._now
        try:
            with uncounted():
                yield
        finally:
            self._again = None
            self._fresh, self._began, self._now = held

    def _read_drafts(self, call: PrefixCall, cache: Cache, output: Any) -> None:
        """Read what stood behind a prompt behind what is left of it, and give it out behind that."""
        base, states = self.decoder.base, getattr(output, "hidden_states", None) is not None
        with self._within():
            more = base(
                **call.later, use_cache=True, output_hidden_states=states, return_dict=True,
                **cache_argument(base, cache),
            )  # fmt: skip
        joined(output, more)

    def _read_again(self, cache: Cache, again: Again, ids: Tensor, mask: Tensor, position: Tensor) -> None:
        """Read tokens behind a prompt for what its entries are scored by."""
        self._again = again
        self.decoder.base(
            input_ids=ids, attention_mask=mask.long(), position_ids=position, use_cache=True,
            **cache_argument(self.decoder.base, cache),
        )  # fmt: skip

    # In the blocks ----------------------------------------------------------------------------------------------

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Keep references to what the next merge will ask for; add log(size) where the method wants it."""
        now: PrefixCall | None = kwargs.pop(CALL, None)
        now = self._of_thread() if now is None else now
        if now is None:
            return call(module, *args, **kwargs)
        query, key, value = args[:3]
        if now.fresh and self._probed(now, layer):
            now.traces[layer] = trace_of(query, key, value, kwargs, self.decoder.traits[layer])
        segment, tables = now.segment(layer), now.heads.get(layer)
        votes: Tensor | None = getattr(segment if tables is None else tables, "votes", None)
        votes = None if votes is None else votes[..., -key.shape[2] :]
        if self.eviction is not None and self.eviction.looks(now, self._again):
            began = self.clock()
            self.eviction.score(now, self._again, layer, (query, key, value), kwargs.get("scaling"), votes)
            # A second reading is counted as a whole.
            self.stats.reducer_seconds += self.clock() - began if self._again is None else 0.0
        if votes is None:
            return call(module, *args, **kwargs)
        return proportional_attention(call, module, args, kwargs, votes)

    def _probed(self, call: PrefixCall, layer: int) -> bool:
        """Whether a merge that is to come asks what the attention of this layer computed."""
        return any(
            s not in call.plans and layer in self.decoder.below(s, r.needs.layers) for s, r in self.reducers.items()
        )

    def _reads(self, call: PrefixCall, layer: int) -> int | None:
        """The first block of the segment by which a block's arguments are changed; None leaves them as they are."""
        return call.first(layer)

    def _places(self, call: PrefixCall, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """``(B, q)``, where the tokens that enter the decoder stand in the original sequence."""
        given = kwargs.get("position_ids")
        given = call.places if given is None or given.ndim != 2 else given
        assert given is not None
        return given.expand(len(call.valid), -1)

    def _window_places(self, call: PrefixCall, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """``(B, q)``, the places by which the windows of a block tell how far tokens are from the prompt's entries."""
        return self._places(call, hidden, kwargs)

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if stands_aside() else self._enter_block(index, args, kwargs)

        return hook

    def _enter_block(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block, traits = self.blocks[index], self.decoder.traits[index]
        given = block.named(args, kwargs)
        call: PrefixCall | None = given.get(CALL)
        call = self._of_thread() if call is None else call
        if call is None:
            return None
        self._check_order(call, index)
        hidden, cache = given[block.hidden], given_cache(given)
        if call.fresh and index in self.stages:
            # A reducer computes as it always does, also where the model runs under autocast.
            with torch.autocast(hidden.device.type, enabled=False):
                hidden = self._merge(call, index, hidden, given)
        tokens = call.tokens(index + 1)
        # Where keys and values are borrowed, a model may go on with the last tokens alone, which are no slots.
        last = hidden.shape[1] if traits.shares and hidden.ndim == 3 and hidden.shape[1] < tokens else None
        if call.fresh and index in call.added:
            added = nn.functional.pad(call.added[index].to(hidden.dtype), (0, 0, 0, call.drafts))
            hidden = in_streams(hidden, tokens, lambda x: x + added[:, -x.shape[1] :])
        if index == 0 and call.fresh and self.eviction is not None:
            self.eviction.begin(call, self._places(call, hidden, given), cache)
            if call.stands is not None and (unit := self.eviction.evictor.unit) is not None:
                call.lines = self._spans(call, unit, "cache", self._ids(call, 0), call.valid, call.protected)
        if call.fresh:
            if cache is not None and traits.owns:
                entries = traits.entries
                assert entries is not None
                fill(cache, entries, call.state, tokens - call.drafts, self._gone(call, index),
                     moves=entries == self._counting)  # fmt: skip
        elif traits.owns or index in call.state.segments:
            if cache is None:
                raise QuickmergeError(
                    "gradient checkpointing must be off where text is read behind a prompt: it takes the cache away"
                )
            self._extend(call, index, hidden, cache, given)
            if traits.owns:
                entries = traits.entries
                assert entries is not None
                expect(cache, entries)
                if tables_of(cache, entries) is not None:
                    call.heads[index] = extend_heads(
                        cache, entries, self._window_places(call, index, hidden, given), call.valid, call.whole_new,
                        None if call.state.short else call.last_place,
                    )  # fmt: skip
                    return block.call(block.masked(given, self._mask_of_heads(call, index, hidden)))
        first = self._reads(call, index)
        if first is None:
            return None
        segment = call.segments[first]
        if call.fresh:
            plan = call.composed[list(call.plans).index(first)]
            step = call.plans[index] if index == first else None
            slots = Slots(
                call.source[first], plan, call.valid.shape[1], call.drafts, step=step, entering=call.tokens(index)
            )
            given = block.follow(given, slots, segment.valid, segment.padded)
        was = given.get(block.mask)
        if block.attends(was):
            key = (first, self.decoder.windows[index], f"{traits.attention} {last}")
            if key not in call.masks:
                # A model that makes a mask where none is needed reads it.
                skip = was is None and last is None
                call.masks[key] = (
                    segment.mask(self.decoder, index, tokens, hidden, cache if last is None else None, skip=skip)
                    if call.see is None
                    else segment.tree_mask(call.see(index), self.decoder.windows[index])
                )
                if last is not None:
                    call.masks[key] = call.masks[key][..., -last:, :]
            given = block.masked(given, call.masks[key])
        given[block.hidden] = hidden
        return block.call(given)

    def _check_order(self, call: PrefixCall, index: int) -> None:
        """Refuse a model that runs through its blocks more than once, whose lower ones would read slots."""
        if call.entered >= index and not self._recomputes:
            raise UnsupportedModelError(
                f"prefix merging can't be served for {self._name}, which runs block {index} again behind block "
                f"{call.entered}: a merge lies in front of a block once"
            )
        call.entered = index

    def _widen(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Give out slots as if they were as many as the tokens, for a model that gives its output their shape."""
        call: PrefixCall | None = kwargs.get(CALL) or self._now
        if stands_aside() or call is None or not call.fresh:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        gone = call.valid.shape[1] - hidden.shape[1]
        if not gone:
            return None
        hidden = nn.functional.pad(hidden, (0, 0, gone, 0))
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def _mask_of_heads(self, call: PrefixCall, index: int, hidden: Tensor) -> Tensor | None:
        """The mask of a block whose key heads hold entries of their own."""
        return call.heads[index].mask(
            hidden.shape[1], self.decoder.config.num_attention_heads, additive=self.decoder.attention == "eager",
            dtype=hidden.dtype, device=hidden.device, see=None if call.see is None else call.see(index),
        )  # fmt: skip

    def _extend(self, call: PrefixCall, index: int, hidden: Tensor, cache: Cache, kwargs: dict[str, Any]) -> None:
        """Let the tables of the segment that begins at a block, if one does, go on with the tokens that are read."""
        segment = call.state.segments.get(index)
        if segment is not None:
            holder = self._holder(index)
            if holder is None:  # nothing above attends
                return
            places = self._places(call, hidden, kwargs)
            segment = segment.extended(
                places, call.valid, cache.get_seq_length(holder), whole=call.whole_new, high=call.last_place
            )
            call.segments[index] = call.state.segments[index] = segment

    def _holder(self, index: int) -> int | None:
        """The layer of the cache that holds entries of the segment that begins with a block; None if none does."""
        later = [layer for layer in self.stages if layer > index]
        blocks = range(index, min(later, default=len(self.decoder)))
        return next((self.decoder.traits[i].entries for i in blocks if self.decoder.traits[i].owns), None)

    # Merging ----------------------------------------------------------------------------------------------------

    def _merge(self, call: PrefixCall, index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """Decide in front of block ``index``, unless that is done already, and carry it out."""
        tokens = call.tokens(index)
        n = tokens - call.drafts
        if index not in call.plans:
            began = self.clock()
            places = self._places(call, hidden, kwargs)
            # Computed again for its gradient, a block must save what it saved before, and it won't decide again.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not self._recomputes):
                self._decide(call, index, one_stream(hidden, tokens)[:, :n], places)
            self.stats.reducer_seconds += self.clock() - began
        if index not in call.segments:
            return hidden
        plan = call.plans[index]
        return in_streams(hidden, tokens, lambda x: torch.cat([plan.merge(x[:, :n]), x[:, n:]], 1))

    @property
    def _recomputes(self) -> bool:
        return self.decoder.base.training and any(
            getattr(block, "gradient_checkpointing", False) for block in self.decoder.layers
        )

    def _decide(self, call: PrefixCall, index: int, hidden: Tensor, places: Tensor) -> None:
        """Plan for the prompt's tokens or slots ``hidden (B, n, D)``; ``places (B, N)`` are those of all its tokens."""
        assert call.protected is not None and call.whole is not None
        below, n, reducer = call.segment(index - 1), hidden.shape[1], self.reducers[index]
        prompt = call.valid.shape[1] - call.drafts
        wanted = [layer for layer in self.decoder.below(index, reducer.needs.layers) if layer in call.traces]
        # A probe below an earlier merge saw more tokens than there are now, so it can't speak for them.
        traces = [
            replace(t, query=t.query[:, :, :n], key=t.key[:, :, :n], value=t.value[:, :, :n])
            for t in (call.traces[layer] for layer in wanted)
            if t.query.shape[2] == n + call.drafts
        ]

        def carried(mask: Tensor | None) -> Tensor | None:
            return mask if mask is None or call.plan is None else call.plan.carry(mask)

        view = TokenView(
            hidden=hidden,
            valid=call.valid[:, :n] if below is None else below.valid[:, :n],
            protected=carried(call.protected),  # type: ignore[arg-type]
            position=places[:, :n] if below is None else below.position[:, :n],
            size=None if below is None else below.size[:, :n],  # type: ignore[arg-type]
            exempt=carried(call.exempt),
            length=call.length,  # type: ignore[arg-type]
            evidence=Evidence(attention=traces, layer=index),
            known=call.known,
        )
        known, kept_whole = call.known, call.kept_whole
        if known is None or kept_whole is None:
            shut = (call.whole | ~view.free.any(-1)).tolist()
        else:
            fixed = zip(kept_whole, known.valid, known.protected, strict=True)
            shut = [whole or valid == protected for whole, valid, protected in fixed]
        plan, added = MergePlan.identity(view), {}
        if not all(shut):
            view = replace(view, group=self._group(call, index, view))
            rows = [row for row, whole in enumerate(shut) if not whole] if any(shut) else None
            align = reducer.align if index == min(self.reducers) else lambda view, plan: {}
            planned = plan_rows(view, rows, reducer.plan, align)
            # Where every token stays alone, hidden states and the block's own arguments are left as they are, padding
            # and all, so keep=1 is the model bit for bit.
            decided = planned.plan.counted()
            if decided.counts != (tuple(view.valid.sum(-1).tolist()) if known is None else known.valid):
                plan, added = decided, planned.added
                self._begin_segment(call, index, plan, places, prompt, reducer.proportional)
        call.decide(index, plan)
        if call.group is not None:
            call.group = call.group.gather(1, anchors_of(plan, view))
        if index in call.segments:
            # What was added below stays as it was, for blocks that are computed again.
            call.added = added or {b: plan.merge(x) if b >= index else x for b, x in call.added.items()}

    def _group(self, call: PrefixCall, index: int, view: TokenView) -> Tensor | None:
        """The span of each token in front of block ``index``, where its method asks; that of a slot's anchor."""
        unit = self.reducers[index].needs.spans
        if unit is None or call.group is not None:
            return call.group
        call.group = self._spans(call, unit, "spans", self._ids(call, index), view.valid, view.protected)
        return call.group

    def _spans(
        self, call: PrefixCall, unit: str, what: str, ids: Tensor | None, valid: Tensor, protected: Tensor | None
    ) -> Tensor | None:
        """The span of each token ``(B, n)``; None, and a note in the summary, where nobody can tell."""
        tokenizer, stats = self._tokenizer(), self.stats
        if ids is None and unit != "auto":
            raise QuickmergeError(f"{what}={unit!r} needs input_ids, and the model was called with inputs_embeds")
        if ids is None or tokenizer is None:
            why = "no tokenizer is known; pass tokenizer=..." if ids is not None else "there were inputs_embeds alone"
            stats.spans = f"none, {why}"
            return None
        unit = "line" if unit == "auto" else unit
        stats.spans = unit
        return within(spans(ids, valid, tokenizer, unit), valid, valid & False if protected is None else protected)

    def _ids(self, call: PrefixCall, index: int) -> Tensor | None:
        """``(B, n)``, the ids of the tokens in front of the first merge of all tokens; None where there were none."""
        return call.ids

    def _gone(self, call: PrefixCall, index: int) -> int:
        """How many tokens a prompt lost in front of the first block, for a block that reads what that one does."""
        return 0

    def _seats(self, plan: MergePlan, source: Tensor) -> Tensor:
        """The columns of the given prompt at which slots stand, ``(B, K)``; ``source`` are those of the first block."""
        return source

    def _begin_segment(
        self, call: PrefixCall, index: int, plan: MergePlan, places: Tensor, prompt: int, proportional: bool
    ) -> None:
        """Note what the blocks from ``index`` on read of a prompt of ``prompt`` columns; ``places (B, N)`` of all."""
        segment = Segment.of(plan, call.segment(index - 1), proportional, call.reach)
        source = columns_at(places[:, :prompt], call.valid[:, :prompt], plan.position)
        call.state.seats = self._seats(plan, source)
        if call.drafts:
            behind = torch.arange(prompt, prompt + call.drafts, device=source.device).expand(len(source), -1)
            source = torch.cat([source, behind], 1)
            segment = segment.extended(
                places[:, prompt:], call.valid[:, prompt:], whole=call.drafts_whole, high=call.last_place
            )
        call.source[index] = source
        call.segments[index] = call.state.segments[index] = segment

    # Afterwards -------------------------------------------------------------------------------------------------

    def tokens_per_layer(self) -> list[float]:
        """Mean valid tokens per row that each block read of the prompt."""
        call = self._now
        if call is None:
            return []
        means: dict[int | None, float] = {}
        firsts = [call.first(layer) for layer in range(len(self.decoder))]
        for first in firsts:
            if first not in means:
                means[first] = self._mean_tokens(call, first)
        return [means[first] for first in firsts]

    def _mean_tokens(self, call: PrefixCall, first: int | None) -> float:
        """Mean valid tokens per row of a prompt that the segment holds which begins with a block; None below it."""
        known = call.lengths if first is None else call.segments[first].counts
        if known is not None:
            return float(torch.tensor(known).float().mean())
        segment = None if first is None else call.segments[first]
        valid = call.valid[:, : call.valid.shape[1] - call.drafts] if segment is None else segment.valid
        return float(valid[:, : None if segment is None else segment.slots].sum(-1).float().mean())

    def entries(self, cache: Cache | None) -> list[Tensor]:
        """For each layer ``(B,)`` the entries of the prompt just read in ``cache``, mean over its heads."""
        call = self._now
        if call is None:
            return []
        counts = []
        for layer in range(len(self.decoder)):
            held = None if cache is None or layer >= len(cache.layers) else cache.layers[layer]
            tables = getattr(held, "heads", None)
            if tables is not None:
                ones = call.valid.new_ones(len(call.valid), 1, tables.count)
                counts.append((ones if tables.valid is None else tables.valid).sum(-1).float().mean(1))
                continue
            segment = call.segment(layer)
            valid = call.valid[:, : call.valid.shape[1] - call.drafts] if segment is None else segment.valid
            counts.append(valid[:, : None if segment is None else segment.slots].sum(-1).float())
        return counts

    def forget(self) -> None:
        """Nothing of a prompt is kept; plans and statistics stay for the summary."""
