"""The cache of block-causal mode: slots of finished chunks, then single tokens, and everything needed to read on.

All of it lies in the cache's layers. So a cache may be copied, handed from one ``with`` block to the next, and have its
rows picked, moved and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.run import Run
from quickmerge.merge.text.merged_cache import moving_rows
from quickmerge.merge.text.modes import BlockCausal
from quickmerge.merge.text.rows import check_one_text
from quickmerge.merge.tokens.budget import ReadingBudget
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.tokens.view import Evidence, TokenView
from quickmerge.models.attachment import PerThread, refuse_assisted, watch_generate
from quickmerge.models.compat import DynamicLayer, cache_argument, cache_name, cache_trait, given_cache
from quickmerge.models.decoder import AttentionFunction, Decoder, decoder_mask, proportional_attention


@dataclass(frozen=True)
class Rules:
    """The settings by which chunks are merged."""

    reducer: Reducer
    sinks: int
    chunk: int
    window: int

    def __deepcopy__(self, memo: Any) -> Self:
        """Itself: a copy of a cache goes by the same settings, and needs no trained parts of its own."""
        return self

    def differences(self, others: Rules) -> list[str]:
        """Each setting in which ``others`` differ, with both values."""
        found = []
        for name in (f.name for f in fields(self)):
            own, other = getattr(self, name), getattr(others, name)
            if own != other:
                same = repr(own) == repr(other)
                found.append(f"{name} of other trained parts" if same else f"{name}={own!r} and not {other!r}")
        return found


class Reader:
    """What a budget that reads has read: tokens of the unfinished chunk, its memory, and each chunk's surprise."""

    def __init__(self, budget: ReadingBudget, chunk: int) -> None:
        self.budget, self.chunk = budget, chunk
        self.pending: Tensor | None = None
        self.memory: Any = None
        self.surprises: list[Tensor] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """A copy that goes on by itself, with the same budget and whatever that was trained with."""
        other = Reader(self.budget, self.chunk)
        memo[id(self)] = other
        other.pending, other.memory, other.surprises = deepcopy((self.pending, self.memory, self.surprises), memo)
        return other

    def read(self, hidden: Tensor) -> None:
        """Take in hidden states ``(B, q, D)``, chunk by chunk as they are finished."""
        self.pending = hidden if self.pending is None else torch.cat([self.pending, hidden], 1)
        while self.pending.shape[1] >= self.chunk:
            index = torch.arange(self.chunk, device=hidden.device).expand(len(hidden), -1)
            view = TokenView(
                hidden=self.pending[:, : self.chunk],
                position=len(self.surprises) * self.chunk + index,
                evidence=Evidence(layer=self.budget.layer),
            )
            found, self.memory = self.budget.read(view, self.memory)
            self.surprises.append(found)
            self.pending = self.pending[:, self.chunk :]

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Rows follow their beams."""
        self.pending = None if self.pending is None else change(self.pending)
        self.surprises = [change(found) for found in self.surprises]
        if self.memory is not None:
            self.memory.each_row(change)

    def before(self, chunk: int) -> Tensor | None:
        """Surprise ``(B,)`` of the chunk before number ``chunk``; None for the first."""
        return self.surprises[chunk - 1] if chunk else None


class ChunkedLayer(moving_rows(DynamicLayer)):  # type: ignore[misc]
    """A cache layer that stores slots of old chunks and then the tokens that no chunk has absorbed yet.

    Its logical length counts every token it was ever given; what it stores is shorter. ``query`` keeps the queries
    of the unabsorbed tokens, from which a chunk's statistics are taken when it closes. A run that is about to have keys
    and values written says so by ``expected``: outside of one, slots would be taken for tokens.
    """

    is_croppable = False

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.rules = rules
        self.absorbed = 0
        self.slots = 0
        self.query: Tensor | None = None
        self.valid: Tensor | None = None
        self.size: Tensor | None = None
        self.reader: Reader | None = None
        self.expected = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values ``(B, H, q, D)``; returns all of them.

        Raises:
            QuickmergeError: outside of a run in block-causal mode.
        """
        expected, self.expected = self.expected, False
        if not expected:
            raise QuickmergeError(
                f"{cache_name()} holds chunks that were merged inside quickmerge.reduce(..., mode='block_causal'): go "
                "on with it in such a block of the same settings, or start with an empty cache"
            )
        return super().update(key_states, value_states, *args, **kwargs)  # type: ignore[no-any-return]

    def get_seq_length(self) -> int:
        """Tokens seen, merged or not."""
        return int(super().get_seq_length()) - self.slots + self.absorbed

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Stored entries plus the new ones; the offset makes logical and stored length agree."""
        stored = super().get_seq_length()
        return stored + query_length, self.get_seq_length() - stored

    def crop(self, tokens_to_remove: int) -> None:
        """Not possible: merged chunks can't be taken apart."""
        raise QuickmergeError("a cache merged in block_causal mode can't be cropped; use prefix mode")

    def each_row(self, change: Callable[[Tensor], Tensor]) -> None:
        """Move what is kept besides keys and values."""
        if self.reader is not None:
            self.reader.each_row(change)
        self.query = None if self.query is None else change(self.query)
        self.valid = None if self.valid is None else change(self.valid)
        self.size = None if self.size is None else change(self.size)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.absorbed = self.slots = 0
        self.query = self.valid = self.size = None
        if self.reader is not None:
            self.reader = Reader(self.reader.budget, self.reader.chunk)


def chunked_layers(cache: Cache, blocks: Sequence[int], rules: Rules) -> dict[int, ChunkedLayer]:
    """The layers of a filled cache that can be read on by ``rules`` in these blocks, by block.

    Raises:
        QuickmergeError: if the cache was filled elsewhere, or by other settings.
    """
    found = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, ChunkedLayer)}
    if not found:
        raise QuickmergeError(
            f"{cache_name()} was filled outside of block_causal mode; start it with an empty cache inside the run"
        )
    if tuple(found) != tuple(blocks):
        raise QuickmergeError(
            f"{cache_name()} was merged from block {min(found)} on, and layer={min(blocks)} was asked for: give "
            "reduce(...) the same layer, or start with an empty cache"
        )
    for layer in found.values():
        if wrong := rules.differences(layer.rules):
            raise QuickmergeError(
                f"{cache_name()} was merged with other settings than those of this run ({', '.join(wrong)}): give "
                "reduce(...) the same ones, or start with an empty cache"
            )
    return found


# Block-causal mode: keys and values of finished chunks are merged once they have left the recent window.
#
# Query t sees chunk c as slots from the moment ``t >= end_c + window`` (its closing time) and as single tokens before,
# whether the text is fed whole, in pieces or token by token. Budget and statistics of a chunk come from that chunk and
# the window that follows it, all of it read before the closing time, so nothing after t can change a logit at or
# before t.


class BlockCausalRun(Run):
    """See `quickmerge.reduce`. Sliding-window blocks bound their cache themselves and are left alone."""

    mode = "block_causal"
    no_trees = "block_causal mode merges what it has read for good, drafted tokens too; use prefix mode"
    _layers: PerThread[dict[int, ChunkedLayer]] = PerThread(dict)

    def __init__(self, decoder: Decoder, reducer: Reducer, first: int, mode: BlockCausal) -> None:
        super().__init__(decoder, reducer)
        self.rules = Rules(reducer, mode.sinks, mode.chunk, mode.window)
        self.merged = tuple(i for i in range(first, len(decoder)) if decoder.windows[i] is None)
        if not self.merged:
            raise QuickmergeError(f"layer {first} and above hold sliding-window attention only, nothing to merge")
        budget = self.reducer.budget
        self.reading = budget if isinstance(budget, ReadingBudget) else None
        if self.reading is not None and self.merged[0] != self.reading.layer:
            raise QuickmergeError(
                f"layer must be {self.reading.layer} for a budget that reads in front of that block, got {first} "
                f"(the first block with full attention from there is {self.merged[0]})"
            )

    def _attach(self) -> None:
        super()._attach()
        self._undo.append(watch_generate(self.decoder.model, self._around_generate))

    def _around_generate(self, given: dict[str, Any], call: Callable[..., Any]) -> Any:
        """Refuse decoding that takes guesses back, by the name of the argument."""
        refuse_assisted(
            self.decoder.model, given, "in block_causal mode, which merges guessed tokens for good: use prefix mode"
        )
        return call()

    def begin(self, prompt: bool, inputs: dict[str, Any]) -> dict[str, Any]:
        """Give a fresh cache our layers, and check that there is no padding."""
        if self.decoder.base.training and any(getattr(b, "gradient_checkpointing", False) for b in self.decoder.layers):
            raise QuickmergeError(
                "gradient checkpointing must be off in block_causal mode: blocks hold state, got it on"
            )
        mask = inputs.get("attention_mask")
        wanted = inputs.get("output_attentions")
        if self.decoder.config.output_attentions if wanted is None else wanted:
            raise QuickmergeError(
                "output_attentions must be False in block_causal mode, where one query may read a chunk as tokens and "
                "the next one its slots, so that weights have no common columns; got True"
            )
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2 or not bool(mask.all())):
            raise QuickmergeError("attention_mask must be all ones in block_causal mode (no padding), got another mask")
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        cache = given_cache(inputs)
        check_one_text(inputs, None, cache is not None)
        if not prompt and cache is not None:
            self._layers = chunked_layers(cache, self.merged, self.rules)
            for layer in self._layers.values():
                layer.expected = True
            return {}
        self.stats.rows, self.stats.tokens_in = ids.shape[0], float(ids.shape[1])
        self._layers = {i: ChunkedLayer(self.rules) for i in self.merged}
        if self.reading is not None:
            self._layers[self.reading.layer].reader = Reader(self.reading, self.rules.chunk)
        use_cache = inputs.get("use_cache")
        if cache is None and (self.decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.decoder.config)
        if cache is None:
            return {}
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise QuickmergeError(
                f"{cache_name()} must be a DynamicCache that stays on its device, got {cache_trait(cache)}"
            )
        while len(cache.layers) < len(self.decoder):
            cache.layers.append(DynamicLayer())
        for i, layer in self._layers.items():
            cache.layers[i] = layer
            layer.expected = True
        return cache_argument(self.decoder.base, cache)

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Attend block by block, absorbing each chunk when it closes."""
        held = self._layers.get(layer)
        if held is None:
            return call(module, *args, **kwargs)
        query, key, value = args[:3]
        q, chunk, whole = query.shape[2], self.rules.chunk, self.rules.chunk + self.rules.window
        began = key.shape[2] - q - held.slots  # unabsorbed tokens that were there before
        held.query = query if held.query is None else torch.cat([held.query, query], 2)
        out, done = [], 0
        while done < q:
            # The next chunk closes once `chunk + window` unabsorbed tokens are there.
            ready = whole - (began + done)
            take = min(q - done, max(ready, 1))
            end = held.slots + began + done + take
            mask = self._mask(held, query[:, :, done : done + take], end)
            inner = (query[:, :, done : done + take], key[:, :, :end], value[:, :, :end], mask, *args[4:])
            if self.reducer.proportional and held.size is not None:
                size = torch.nn.functional.pad(held.size, (0, end - held.slots), value=1)
                part, _ = proportional_attention(call, module, inner, kwargs, size)
            else:
                part, _ = call(module, *inner, **kwargs)
            out.append(part)
            done += take
            if began + done >= whole:
                clock = self.clock()
                with torch.autocast(key.device.type, enabled=False):
                    key, value = self._absorb(held, layer, key, value, kwargs.get("scaling"))
                began -= chunk
                self.stats.reducer_seconds += self.clock() - clock
        held.keys, held.values, held.is_initialized = key, value, True
        return (out[0] if len(out) == 1 else torch.cat(out, 1)), None

    def _block_hook(self, index: int) -> Callable[..., Any] | None:
        if self.reading is None or index != self.reading.layer:
            return None

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reader = self._layers[index].reader
            assert reader is not None
            clock = self.clock()
            hidden = args[0] if args else kwargs["hidden_states"]
            with torch.autocast(hidden.device.type, enabled=False):
                reader.read(hidden)
            self.stats.reducer_seconds += self.clock() - clock

        return hook

    def _mask(self, held: ChunkedLayer, query: Tensor, end: int) -> Any:
        q = query.shape[2]
        valid = held.valid
        if valid is not None:
            fresh = torch.ones(len(valid), end - held.slots, dtype=torch.bool, device=valid.device)
            valid = torch.cat([valid, fresh], 1)
        return decoder_mask(
            self.decoder,
            rows=len(query),
            queries=q,
            keys=end,
            query_offset=end - q,
            key_offset=0,
            valid=valid,
            dtype=query.dtype,
            device=query.device,
        )

    def _absorb(
        self, held: ChunkedLayer, layer: int, key: Tensor, value: Tensor, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        """Replace the oldest unabsorbed chunk by its slots.

        The reducer sees the chunk and the window after it, whose tokens vote and come on top of the budget. So budget
        and reducer decide about the chunk alone, none of whose tokens is recent any more. A slot keeps its
        anchor's key, already rotated to the anchor's own position, since rotated keys must not be averaged; its value
        is the weighted mean of its members' values.
        """
        assert held.query is not None
        start, c, n = held.slots, self.rules.chunk, self.rules.chunk + self.rules.window
        inside = slice(start, start + n)
        index = torch.arange(n, device=key.device).expand(len(key), -1)
        trace = AttentionTrace(
            held.query[:, :, :n],
            key[:, :, inside],
            value[:, :, inside],
            held.query.shape[-1] ** -0.5 if scaling is None else scaling,
        )
        view = TokenView(
            hidden=value[:, :, inside].transpose(1, 2).flatten(2),
            position=held.absorbed + index,
            protected=(held.absorbed + index < self.rules.sinks) | (index >= c),
            exempt=index >= c,
            latest=False,
            evidence=Evidence(
                attention=(trace,) if self.reducer.needs.layers else (),
                surprise=self._surprise(held.absorbed // c),
                layer=layer,
            ),
        )
        plan = self.reducer.plan(view)
        # Padding slots stand on the left, so the window's own slots are the last ones of every row.
        slots = plan.slots - self.rules.window
        position, valid, size = plan.position[:, :slots], plan.valid[:, :slots], plan.size[:, :slots]
        anchor = (position - held.absorbed).clamp_min(0)[:, None, :, None]
        slot_key = trace.key.gather(2, anchor.expand(-1, trace.key.shape[1], -1, trace.key.shape[3]))
        slot_value = plan.merge(trace.value.transpose(1, 2))[:, :slots].transpose(1, 2)
        key = torch.cat([key[:, :, :start], slot_key, key[:, :, start + c :]], 2)
        value = torch.cat([value[:, :, :start], slot_value, value[:, :, start + c :]], 2)
        if held.valid is not None or not bool(valid.all()):
            before = valid.new_ones(len(key), start) if held.valid is None else held.valid
            held.valid = torch.cat([before, valid], 1)
        held.size = size if held.size is None else torch.cat([held.size, size], 1)
        held.query = held.query[:, :, c:]
        held.slots, held.absorbed = held.slots + slots, held.absorbed + c
        return key, value

    def _surprise(self, chunk: int) -> Tensor | None:
        reader = None if self.reading is None else self._layers[self.reading.layer].reader
        return None if reader is None else reader.before(chunk)

    def tokens_per_layer(self) -> list[float]:
        """Entries that each block holds of the prompt."""
        counts = []
        for i in range(len(self.decoder)):
            held = self._layers.get(i)
            if held is None:
                counts.append(self.stats.tokens_in)
                continue
            tail = self.stats.tokens_in - held.absorbed
            slots = float(held.slots) if held.valid is None else float(held.valid.sum(-1).float().mean())
            counts.append(slots + tail)
        return counts

    def forget(self) -> None:
        """Drop the layers of the last prompt; the caller's cache keeps its own."""
        self._layers = {}
