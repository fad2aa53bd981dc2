"""The cache of block-causal mode: slots of finished chunks, then single tokens, and everything needed to read on.

All of it lies in the cache's layers. So a cache may be copied, handed from one ``with`` block to the next, and have its
rows picked, moved and repeated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.run import Run
from quickmerge.merge.text.blocks import not_chunked, not_mergeable, trace_of
from quickmerge.merge.text.merged_cache import moving_rows
from quickmerge.merge.text.modes import BlockCausal
from quickmerge.merge.text.rows import check_one_text
from quickmerge.merge.tokens.view import Evidence, Known, TokenView
from quickmerge.models.attachment import PerThread, refuse_assisted, watch_generate
from quickmerge.models.compat import (
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    cache_argument,
    cache_name,
    cache_trait,
    given_cache,
    own_cache,
)
from quickmerge.models.decoder import AttentionFunction, Decoder, decoder_mask, proportional_attention
from quickmerge.models.literals import literal_mask
from quickmerge.models.moved import read
from quickmerge.models.spans import tokenizer_of
from quickmerge.models.traits import FULL, INDEXED

LOOKBACK = 64
"""Tokens in front of a chunk that are read with it to find its literals, one of which may have begun there."""


@dataclass(frozen=True)
class Rules:
    """The settings by which chunks are merged."""

    reducer: Reducer
    sinks: int
    chunk: int
    window: int
    protect: str | None = None

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


def _chunked(kind: Any) -> Any:
    """A class of cache layers of ``kind`` that store slots of old chunks, then tokens no chunk has absorbed yet.

    Its logical length counts every token it was ever given; what it stores is shorter. ``query`` keeps the queries
    of the unabsorbed tokens, from which a chunk's statistics are taken when it closes, and where literals stay alone
    ``text`` their ids, with those of the last `LOOKBACK` absorbed ones in front. A run that is about to have keys
    and values written says so by ``expected``: outside of one, slots would be taken for tokens. ``attended`` says that
    this forward's attention was computed.
    """

    class Chunked(moving_rows(kind)):  # type: ignore[misc]
        """See `quickmerge.merge.text.block_causal`."""

        is_croppable = False

        def __init__(self, rules: Rules, **settings: Any) -> None:
            super().__init__(**settings)
            self.rules = rules
            self.absorbed = self.slots = 0
            self.query: Tensor | None = None
            self.text: Tensor | None = None
            self.valid: Tensor | None = None
            self.size: Tensor | None = None
            self.expected = self.attended = False

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            """Append keys and values ``(B, H, q, D)``; returns all of them.

            Raises:
                QuickmergeError: outside of a run in block-causal mode.
            """
            expected, self.expected = self.expected, False
            if not expected:
                raise QuickmergeError(
                    f"{cache_name()} holds chunks that were merged inside quickmerge.reduce(..., mode='block_causal'): "
                    "go on with it in such a block of the same settings, or start with an empty cache"
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
            self.query = None if self.query is None else change(self.query)
            self.text = None if self.text is None else change(self.text)
            self.valid = None if self.valid is None else change(self.valid)
            self.size = None if self.size is None else change(self.size)

        def reset(self) -> None:
            """Forget everything."""
            super().reset()
            self.absorbed = self.slots = 0
            self.query = self.text = self.valid = self.size = None

    return Chunked


ChunkedLayer = _chunked(DynamicLayer)
"""A layer of attention alone."""

ChunkedHybridLayer = _chunked(LinearAttentionAndFullAttentionLayer)
"""A layer of attention beside a memory of fixed size, which reads every token as it always does."""


def chunked_layers(cache: Cache, blocks: Mapping[int, int], rules: Rules) -> dict[int, Any]:
    """The layers of a filled cache that can be read on by ``rules``, by block; ``blocks`` tells the layer of each.

    Raises:
        QuickmergeError: if the cache was filled elsewhere, or by other settings.
    """
    there = {i: layer for i, layer in enumerate(cache.layers) if isinstance(layer, (ChunkedLayer, ChunkedHybridLayer))}
    if not there:
        raise QuickmergeError(
            f"{cache_name()} was filled outside of block_causal mode; start it with an empty cache inside the run"
        )
    if sorted(there) != sorted(blocks.values()):
        raise QuickmergeError(
            f"{cache_name()} was merged from block {min(there)} on, and layer={min(blocks)} was asked for: give "
            "reduce(...) the same layer, or start with an empty cache"
        )
    found = {block: there[layer] for block, layer in blocks.items()}
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
    """See `quickmerge.reduce`.

    Blocks whose attention is not full bound what they read themselves and are left alone, and so are those whose keys
    and values other blocks borrow, and those without attention.
    """

    mode = "block_causal"
    no_trees = "block_causal mode merges what it has read for good, drafted tokens too; use prefix mode"
    _layers: PerThread[dict[int, Any]] = PerThread(dict)
    _literals: PerThread[dict[int, Tensor]] = PerThread(dict)

    def __init__(self, decoder: Decoder, reducer: Reducer, first: int, mode: BlockCausal) -> None:
        super().__init__(decoder, reducer)
        self.rules = Rules(reducer, mode.sinks, mode.chunk, mode.window, mode.protect)
        self.tokenizer = None
        if mode.protect is not None:
            self.tokenizer = tokenizer_of(decoder.model) if mode.tokenizer is None else mode.tokenizer
            if self.tokenizer is None:
                raise QuickmergeError(
                    f"tokenizer must be given for protect={mode.protect!r}, since none is known of {self._name}: "
                    "quickmerge.reduce(..., tokenizer=...)"
                )
        decoder.need("block_causal merging", not_mergeable)
        own = own_cache(decoder.base)
        if own is not None:
            raise UnsupportedModelError(
                f"block_causal merging can't be served for {self._name}, which keeps its past in a {own} of its own"
            )
        self.merged = tuple(i for i in range(first, len(decoder)) if not_chunked(decoder.traits[i]) is None)
        if not self.merged and not any(not_chunked(block) is None for block in decoder.traits):
            decoder.need("block_causal merging", not_chunked)
        if not self.merged:
            raise QuickmergeError(f"layer {first} and above hold sliding-window attention only, nothing to merge")
        self._at = {i: int(decoder.traits[i].entries or 0) for i in self.merged}
        """The layer of the cache of each of them."""

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
        stands = inputs.get("position_ids")
        stands = stands if isinstance(stands, Tensor) and stands.ndim == 2 and stands.shape[1] > 1 else None
        flat = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        there, places = read(None if flat is None else flat.bool(), stands)
        if mask is not None and (there is None or not bool(there.all())):
            raise QuickmergeError("attention_mask must be all ones in block_causal mode (no padding), got another mask")
        ids = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"]
        cache = given_cache(inputs)
        check_one_text({**inputs, "position_ids": places}, None, cache is not None)
        if not prompt and cache is not None:
            self._layers = chunked_layers(cache, self._at, self.rules)
            for layer in self._layers.values():
                layer.expected, layer.attended = True, False
            self._find_literals(inputs.get("input_ids"))
            return {}
        self.stats.rows, self.stats.tokens_in = ids.shape[0], float(ids.shape[1])
        self._layers = {i: ChunkedLayer(self.rules) for i in self.merged}
        if self.rules.protect is not None:
            self.stats.literals = 0.0
        use_cache = inputs.get("use_cache")
        if cache is None and (self.decoder.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache(config=self.decoder.config)
        if cache is None:
            self._find_literals(inputs.get("input_ids"))
            return {}
        if not isinstance(cache, DynamicCache) or cache.offloading:
            raise QuickmergeError(
                f"{cache_name()} must be a DynamicCache that stays on its device, got {cache_trait(cache)}"
            )
        while len(cache.layers) < len(self.decoder):
            cache.layers.append(DynamicLayer())
        for i, layer in self._layers.items():
            there = cache.layers[self._at[i]]
            if isinstance(there, LinearAttentionAndFullAttentionLayer):
                layer = ChunkedHybridLayer(self.rules, number_of_states=there.number_of_states)
                self._layers[i] = layer
            cache.layers[self._at[i]] = layer
            layer.expected = True
        self._find_literals(inputs.get("input_ids"))
        return cache_argument(self.decoder.base, cache)

    def _find_literals(self, ids: Tensor | None) -> None:
        """Mark the literals ``(B, chunk)`` of every chunk that will close in this forward, by its first token.

        Of a chunk the same tokens are looked at however the text is fed: those of the window behind it, which have been
        read when it closes, and none after them.
        """
        if self.rules.protect is None:
            return
        if ids is None:
            raise QuickmergeError("protect needs input_ids, and the model was called with inputs_embeds")
        held = self._layers[self.merged[0]]
        text = ids if held.text is None else torch.cat([held.text.to(ids.device), ids], 1)
        absorbed, chunk, whole = held.absorbed, self.rules.chunk, self.rules.chunk + self.rules.window
        start, found = min(absorbed, LOOKBACK), {}  # of the first chunk, in ``text``
        while text.shape[1] - start >= whole:
            first = max(0, start - LOOKBACK)
            part = text[:, first : start + whole]
            marks = literal_mask(part, torch.ones_like(part, dtype=torch.bool), self.tokenizer)
            found[absorbed] = marks[:, start - first :][:, :chunk]
            start, absorbed = start + chunk, absorbed + chunk
        self._literals = found
        if self._fresh:
            self.stats.literals = sum(float(marks.sum(-1).float().mean()) for marks in found.values())
        rest = text[:, start - min(absorbed, LOOKBACK) :]
        for layer in self._layers.values():
            layer.text = rest

    def attend(self, layer: int, call: AttentionFunction, module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Attend block by block, absorbing each chunk when it closes."""
        held = self._layers.get(layer)
        if held is None:
            if self.decoder.traits[layer].attention in (FULL, INDEXED) and layer > self.merged[0]:
                # The model makes one mask for all such blocks, by how much the lowest of them holds.
                args, kwargs = self._unmerged(args, kwargs)
            return call(module, *args, **kwargs)
        if held.attended:
            raise UnsupportedModelError(
                f"block_causal merging can't be served for {self._name}, which computes attention twice in block "
                f"{layer}"
            )
        held.attended = True
        query, key, value = args[:3]
        # The mask is made here, for each part.
        kwargs = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        if held.keys is not None and held.keys.shape[1::2] != key.shape[1::2]:
            raise UnsupportedModelError(
                f"block_causal merging can't be served for {self._name}, whose block {layer} keeps keys of "
                f"{held.keys.shape[1]} heads of {held.keys.shape[3]} in its cache and attends to others, of "
                f"{key.shape[1]} heads of {key.shape[3]}"
            )
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
                    key, value = self._absorb(held, layer, key, value, kwargs)
                began -= chunk
                self.stats.reducer_seconds += self.clock() - clock
        held.keys, held.values, held.is_initialized = key, value, True
        return (out[0] if len(out) == 1 else torch.cat(out, 1)), None

    def _unmerged(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of an attention that reads every token, with a mask over all of them."""
        was = args[3] if len(args) > 3 else kwargs.get("attention_mask")
        query, n = args[0], args[1].shape[2]
        mask = decoder_mask(
            self.decoder, rows=len(query), queries=query.shape[2], keys=n, query_offset=n - query.shape[2],
            key_offset=0, skip=was is None, dtype=query.dtype, device=query.device,
        )  # fmt: skip
        if len(args) > 3:
            return (*args[:3], mask, *args[4:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _mask(self, held: Any, query: Tensor, end: int) -> Any:
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
        self, held: Any, layer: int, key: Tensor, value: Tensor, kwargs: Mapping[str, Any]
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
        trace = trace_of(
            held.query[:, :, :n], key[:, :, inside], value[:, :, inside], kwargs, self.decoder.traits[layer]
        )
        first, behind = held.absorbed + index < self.rules.sinks, index >= c
        literals = torch.zeros_like(behind)
        if self.rules.protect is not None:
            literals[:, :c] = self._literals[held.absorbed]
        known = None
        if self.rules.protect is None:  # which tokens are of literals the device alone knows
            fixed, rows = min(c, max(0, self.rules.sinks - held.absorbed)), len(key)
            each, stay, extra = ((count,) * rows for count in (n, fixed + n - c, n - c))
            known = Known(each, stay, extra, each, (True,) * rows)
        view = TokenView(
            hidden=value[:, :, inside].transpose(1, 2).flatten(2),
            position=held.absorbed + index,
            protected=first | literals | behind,
            exempt=(literals & ~first) | behind,
            latest=False,
            evidence=Evidence(
                attention=(trace,) if self.reducer.needs.layers else (),
                layer=layer,
            ),
            known=known,
        )
        plan = self.reducer.plan(view).counted()
        # Padding slots stand on the left, so the window's own slots are the last ones of every row.
        slots = plan.slots - self.rules.window
        position, valid, size = plan.position[:, :slots], plan.valid[:, :slots], plan.size[:, :slots]
        anchor = (position - held.absorbed).clamp_min(0)[:, None, :, None]
        slot_key = trace.key.gather(2, anchor.expand(-1, trace.key.shape[1], -1, trace.key.shape[3]))
        slot_value = plan.merge(trace.value.transpose(1, 2))[:, :slots].transpose(1, 2)
        key = torch.cat([key[:, :, :start], slot_key, key[:, :, start + c :]], 2)
        value = torch.cat([value[:, :, :start], slot_value, value[:, :, start + c :]], 2)
        assert plan.counts is not None
        if held.valid is not None or min(plan.counts) < plan.slots:
            before = valid.new_ones(len(key), start) if held.valid is None else held.valid
            held.valid = torch.cat([before, valid], 1)
        held.size = size if held.size is None else torch.cat([held.size, size], 1)
        held.query = held.query[:, :, c:]
        held.slots, held.absorbed = held.slots + slots, held.absorbed + c
        return key, value

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

    def entries(self, cache: Cache | None) -> list[Tensor]:
        """For each block ``(B,)`` the entries that it holds of the prompt; there is no padding in this mode."""
        rows, tokens = self.stats.rows, self.stats.tokens_in
        counts = [torch.full((rows,), tokens)] * len(self.decoder)
        for i, held in self._layers.items():
            slots = torch.full((rows,), float(held.slots)) if held.valid is None else held.valid.sum(-1).float()
            counts[i] = slots + (tokens - held.absorbed)
        return counts

    def forget(self) -> None:
        """Drop the layers of the last prompt; the caller's cache keeps its own."""
        self._layers, self._literals = {}, {}
