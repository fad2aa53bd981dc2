"""The cache as a place of prefix mode: scores are taken while a prompt is read, and entries leave when it has been.

Every layer's scores are made as soon as its attention has run, from the queries, keys and values that it used. How many
entries stay is known only when all merges are decided, so they leave behind the last block; from then on the layer
carries tables of its own, and its mask is made of these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.cache.evict import Entries, as_before, evict, read_again
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.cache.kvzip import KVzip
from quickmerge.merge.cache.packed import shape_of
from quickmerge.merge.cache.view import CacheView
from quickmerge.merge.text.merged_cache import columns_at
from quickmerge.merge.text.prefix_call import PrefixCall
from quickmerge.models.compat import DynamicLayer, DynamicSlidingWindowLayer
from quickmerge.models.decoder import Decoder
from quickmerge.models.rotary import Rotary
from quickmerge.models.traits import not_plain


@dataclass
class Again:
    """A second reading of some of a prompt: the ``call`` that read it first, and the scores that it makes, by layer.

    ``places (B, N)`` are where the prompt's tokens stand, -1 for those that are not read again now.
    """

    call: PrefixCall
    places: Tensor
    scores: dict[int, Tensor] = field(default_factory=dict)

    @cached_property
    def ends(self) -> tuple[Tensor, Tensor]:
        """First and last of the places in each row ``(B, 1)``: they lie side by side."""
        low = torch.where(self.places < 0, torch.iinfo(torch.long).max, self.places).amin(-1, keepdim=True)
        return low, self.places.amax(-1, keepdim=True)


class Eviction:
    """What a run does to the cache of its prompts.

    Args:
        decoder: the language model.
        evictor: the method.
        recent: the last tokens of a row that stay in every head, one at least.

    Raises:
        UnsupportedModelError: the method has to take off a rotary embedding that can't be taken off.
    """

    def __init__(self, decoder: Decoder, evictor: Evictor, recent: int) -> None:
        self.decoder, self.evictor, self.recent = decoder, evictor, recent
        decoder.need("eviction from the cache", not_plain)
        self._rotary: list[Rotary] = []
        if evictor.unrotates:
            wanted = f"cache must be another method than {evictor.name}"
            if not decoder.alone:
                raise UnsupportedModelError(
                    f"{wanted} for {type(decoder.model).__name__}, whose visual tokens have places of their own"
                )
            for i in range(len(decoder)):
                self._rotary.append(Rotary.of(decoder.base, decoder.attention_in(i), i, wanted=wanted))
        elif evictor.replays and not decoder.alone:
            raise UnsupportedModelError(
                f"cache must be another method than {evictor.name} for {type(decoder.model).__name__}: images can't be "
                "read a second time behind the prompt"
            )

    def begin(self, call: PrefixCall, places: Tensor, cache: Cache | None) -> None:
        """A prompt is about to be read into ``cache``; its tokens stand at ``places (B, N)``."""
        if cache is None:
            return
        if call.drafts:
            raise QuickmergeError(
                f"logits_to_keep must be 0 or 1 where entries are evicted from a cache that the model was not given, "
                f"got {call.drafts + 1}: pass use_cache=True, or a cache"
            )
        for layer in cache.layers:
            if not isinstance(layer, (DynamicLayer, DynamicSlidingWindowLayer)) or getattr(layer, "tight", False):
                raise QuickmergeError(
                    f"cache must hold layers of full or sliding attention where entries are evicted, got "
                    f"{type(layer).__name__}"
                )
        assert call.given is not None
        given = call.given.tolist() if call.lengths is None else call.lengths
        short = [tokens < self.evictor.min_tokens for tokens in given]
        call.state.stats.evicted_none = sum(short)
        if self.evictor.keep < 1 and not all(short):
            if self.evictor.replays:
                self._check_again(call)
            call.stands = places

    def _check_again(self, call: PrefixCall) -> None:
        """Refuse a prompt that can't be read a second time, before it is read for the first."""
        wanted = f"cache must be another method than {self.evictor.name}"
        if call.ids is None:
            raise QuickmergeError(f"{wanted} for inputs_embeds: without input_ids they can't be read again")
        if not bool(call.valid.all()) and any(self.decoder.windows):
            raise QuickmergeError(
                f"{wanted} for padded rows in a model with sliding windows, where no text can be read behind padding"
            )
        room = getattr(self.decoder.config, "max_position_embeddings", None)
        self.evictor.check(int(call.valid.sum(-1).max()), room)

    # Scores -----------------------------------------------------------------------------------------------------

    def looks(self, call: PrefixCall, again: Again | None) -> bool:
        """Whether a forward is one whose queries and keys the scores are made of."""
        if again is not None:
            return True
        return call.fresh and call.stands is not None and not self.evictor.replays

    @torch.no_grad()
    def score(
        self, call: PrefixCall, again: Again | None, layer: int, tensors: tuple[Tensor, ...], scaling: float | None,
        votes: Tensor | None,
    ) -> None:  # fmt: skip
        """Score a layer's entries by what its attention is given, in a forward that `looks`.

        Args:
            call: of this forward.
            again: the second reading, if it is one.
            layer: its index.
            tensors: query, key and value.
            scaling: the factor on the scores; None for the usual one.
            votes: ``(B, n)``, as how many tokens the keys count; None for one each.
        """
        first = call if again is None else again.call
        assert first.stands is not None
        query, key, value = tensors
        entries = self._entries(first, layer)
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = None if votes is None else votes.clamp_min(1).to(torch.float32).log()
        if again is not None:
            again.scores[layer] = self._score_again(call, again, entries, (query, key, value), scaling, bias)
            return
        entries = entries.last(key.shape[2])
        rotary = partial(self._rotary.__getitem__, layer) if self._rotary else None
        window = self.decoder.windows[layer]
        group = None if call.lines is None else self._lines(call, layer)[:, -key.shape[2] :]
        view = CacheView(query, key, value, entries.valid, entries.position, scaling, window, bias, rotary, group)
        with torch.autocast(query.device.type, enabled=False):
            call.scores[layer] = self.evictor.scores(view)

    def _lines(self, call: PrefixCall, layer: int) -> Tensor:
        """``(B, n)``: the span of each entry of a layer; that of a slot's own place."""
        assert call.lines is not None and call.stands is not None
        segment = call.segment(layer)
        if segment is None:
            return call.lines
        return call.lines.gather(1, columns_at(call.stands, call.valid, segment.position))

    def _score_again(
        self, call: PrefixCall, again: Again, entries: Entries, tensors: tuple[Tensor, ...], scaling: float,
        bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """``(B, G, n)``: scores of those entries of a layer that are of what is read again, zero for the others.

        A sliding window, behind which the first reading is out of reach, is of no account here.
        """
        query, key, value = tensors
        q, n = query.shape[2], key.shape[2] - query.shape[2]
        entries = entries.last(n)
        low, high = again.ends
        inside = entries.valid & (entries.position >= low) & (entries.position <= high)
        scores = torch.zeros(*key.shape[:2], n, dtype=torch.float32, device=key.device)
        columns = inside.any(0).nonzero().flatten()
        if not len(columns):
            return scores
        part = slice(int(columns[0]), int(columns[-1]) + 1)

        def cut(x: Tensor) -> Tensor:
            return torch.cat([x[:, :, part], x[:, :, n:]], 2)

        valid = torch.cat([inside[:, part], call.valid], 1)
        position = valid.long().cumsum(-1) - 1
        bias = None if bias is None else torch.cat([bias[:, part], bias[:, bias.shape[1] - q :]], 1)
        view = CacheView(query, cut(key), cut(value), valid, position, scaling, None, bias)
        with torch.autocast(query.device.type, enabled=False):
            found = self.evictor.scores(view)
        scores[:, :, part] = torch.where(inside[:, None, part], found.to(scores.dtype), 0.0)
        return scores

    def _entries(self, call: PrefixCall, layer: int) -> Entries:
        """What the entries of a layer stand for when a prompt has been read."""
        segment = call.segment(layer)
        if segment is not None:
            # What is left of a prompt in front of the first block is a text of its own to the model and its windows.
            text = call.first(layer) == 0
            position = (segment.valid.long().cumsum(-1) - 1).clamp_min(0) if text else segment.position
            return Entries(segment.valid, position, segment.votes, call.marked(layer, call.asked))
        assert call.stands is not None
        return Entries(call.valid, call.stands, asked=call.asked)

    def again(
        self, call: PrefixCall, read: Callable[[Again, Tensor, Tensor, Tensor], None], cache: Cache
    ) -> dict[int, Tensor]:
        """Scores by reading a prompt again behind itself.

        Args:
            call: that read it.
            read: reads tokens ``(B, c)``, behind everything that the mask ``(B, N + c)`` tells, at positions ``(B,
                c)``.
            cache: which holds the prompt and will hold no more than it afterwards.
        """
        evictor = self.evictor
        assert isinstance(evictor, KVzip) and call.stands is not None
        ids, valid, stands = call.ids, call.valid, call.stands
        assert ids is not None
        ends = torch.where(valid, stands, -1).amax(-1, keepdim=True)

        def part(new: Tensor, there: Tensor, mine: Tensor) -> dict[int, Tensor]:
            reading = Again(call, torch.where(mine, stands, -1))
            position = (ends + there.long().cumsum(-1)).clamp_min(0)
            segments = dict(call.state.segments)
            with as_before(cache):
                read(reading, new, torch.cat([valid, there], 1), position)
            call.state.segments = segments
            return reading.scores

        return read_again(evictor, ids, valid, part)

    # Afterwards -------------------------------------------------------------------------------------------------

    def finish(self, call: PrefixCall, cache: Cache, scores: dict[int, Tensor]) -> None:
        """Let entries leave the cache of a prompt; see `quickmerge.merge.cache.evict.evict`."""
        entries = [self._entries(call, layer) for layer in range(len(self.decoder))]
        length = call.given
        assert length is not None
        held = {}
        for index, layer in enumerate(cache.layers):
            # A layer that could hold more than its window, as that of speculation does, is no better for it.
            window = self.decoder.windows[index]
            kept = shape_of(layer)[2]
            kept = kept if window is None else min(kept, window - 1)
            held[index] = scores[index][..., scores[index].shape[2] - kept :]
        evict(
            cache, self.evictor, held, entries, length=length, windows=self.decoder.windows,
            recent=(length - 1).clamp(1, max(1, self.recent)),
        )  # fmt: skip
        call.state.evicted = any(layer.heads is not None for layer in cache.layers)
