"""Taking entries out of the layers of a cache, so that their memory is free again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from quickmerge.merge.cache.evictor import Evictor, choose, layer_counts
from quickmerge.merge.cache.heads import HeadTables
from quickmerge.merge.cache.kvzip import KVzip
from quickmerge.merge.cache.packed import pack
from quickmerge.models.moved import numbers, onto

FAR = 2**62
"""A place behind all others."""


@dataclass(frozen=True)
class Entries:
    """What the entries of a layer stand for, ``(B, n)`` each: see `HeadTables`, and ``valid`` is given.

    ``asked``: which of them stay because somebody asked for it; None for none.
    """

    valid: Tensor
    position: Tensor
    votes: Tensor | None = None
    asked: Tensor | None = None

    def last(self, n: int) -> Entries:
        """Those of the last n entries."""
        first = self.valid.shape[1] - n
        votes, asked = (None if x is None else x[:, first:] for x in (self.votes, self.asked))
        return Entries(self.valid[:, first:], self.position[:, first:], votes, asked)


def evict(
    cache: Cache,
    evictor: Evictor,
    scores: Mapping[int, Tensor],
    entries: Sequence[Entries],
    *,
    length: Tensor,
    windows: Sequence[int | None],
    recent: int | Tensor = 0,
) -> None:
    """Let every layer of a cache that holds a prompt keep what its scores say.

    Args:
        cache: of layers of full or sliding attention, that carry the tables of their heads.
        evictor: the method, with its ``keep``.
        scores: by layer ``(B, G, n)``, of all entries or of the last ones, which a sliding window has left.
        entries: of each layer.
        length: ``(B,)``, tokens of the prompt.
        windows: of each layer.
        recent: last entries of a row that stay in every head; ``(B,)`` for a number of its own for each.
    """
    held = [each.last(scores[i].shape[2]) for i, each in enumerate(entries)]
    with torch.no_grad():
        counts = _counts(evictor, held, length, windows)
        kept = [
            choose(evictor, scores[i], each.valid, counts[:, i], recent, held[i].asked)
            for i, each in enumerate(entries)
        ]
    # A model makes one mask for many layers, by what one of them holds: so all have tables of their own, or none.
    every = list(zip(cache.layers, kept, held, windows, strict=True))
    leave = [Leave.of(some, each, window) for _, some, each, window in every]
    told = iter(numbers(*(x for each in leave for x in each)))
    facts = [LeaveFacts.of(next(told), next(told)) for _ in leave]
    held_more = any(layer.keys.shape[2] > some.shape[2] for layer, some, _, _ in every)
    if held_more or any(fact.others for fact in facts):
        for (layer, some, each, window), fact in zip(every, facts, strict=True):
            shrink(layer, some, each, window, fact)


class Leave(NamedTuple):
    """What the host must know of a layer that entries leave, on the device: numbers, and places by column."""

    numbers: Tensor
    lows: Tensor

    @classmethod
    def of(cls, kept: Tensor, entries: Entries, window: int | None) -> Leave:
        """Of a layer's entries, of which ``kept (B, G, n)`` stay."""
        each, none = kept.sum(-1), entries.position.new_zeros(0)
        others = (kept != entries.valid[:, None]).any().long()
        numbers = torch.stack([each.max(), each.min(), each.sum(), others])
        if window is None:
            return cls(numbers, none)
        # Entries by their rank among those that stay: where all heads keep as many, these are the columns.
        rank = torch.where(kept, kept.long().cumsum(-1) - 1, kept.shape[-1])
        place = entries.position[:, None].expand_as(kept)
        lows = torch.full((kept.shape[-1] + 1,), FAR, dtype=torch.long, device=kept.device)
        lows = lows.scatter_reduce(0, rank.flatten(), place.flatten().long(), "amin")[:-1]
        last = torch.where(rank == each[..., None] - 1, entries.position[:, None], -1).max()
        return cls(torch.cat([numbers, last.long()[None]]), lows)


class LeaveFacts(NamedTuple):
    """The same on the host: entries of the head that keeps most, of the one that keeps least, and of all of them;
    whether some leave; the last place; and the first place in each column."""

    most: int
    least: int
    total: int
    others: int
    last: int
    lows: Any

    @classmethod
    def of(cls, numbers: Sequence[int], lows: Sequence[int]) -> LeaveFacts:
        """From what a `Leave` has told; the last place is told where there is a window."""
        most, least, total, others, *last = numbers
        return cls(most, least, total, others, last[0] if last else 0, np.array(lows))


def _counts(evictor: Evictor, held: Sequence[Entries], length: Tensor, windows: Sequence[int | None]) -> Tensor:
    """``(B, L)`` long: how many entries of each row stay in each layer.

    Those that somebody asked for come on top: ``keep`` is a share of the others.
    """
    none = torch.zeros_like(length)
    told = torch.stack([
        torch.stack([each.valid.sum(-1) for each in held], 1),
        torch.stack([none if each.asked is None else each.asked.sum(-1) for each in held], 1),
        length[:, None].expand(-1, len(held)),
    ])  # fmt: skip
    there, asked, lengths = told.tolist()
    out = []
    for row, tokens in enumerate(each[0] for each in lengths):
        if tokens < evictor.min_tokens:
            out.append(there[row])
            continue
        full = [tokens if window is None else min(tokens, window - 1) for window in windows]
        others = [[a - b for a, b in zip(each, asked[row], strict=True)] for each in (there[row], full)]
        counts = layer_counts(evictor.keep, *others)
        out.append([min(a + b, c) for a, b, c in zip(counts, asked[row], there[row], strict=True)])
    return onto(torch.tensor(out), length.device)


def shrink(layer: Any, kept: Tensor, entries: Entries, window: int | None, fact: LeaveFacts) -> None:
    """Let one layer keep some of its entries, and note which of them every head holds.

    Args:
        layer: of a cache, with ``keys`` and ``values (B, G, m + n, d)``, of which the first m leave.
        kept: ``(B, G, n)`` bool.
        entries: of the n.
        window: the layer's sliding window, or None.
        fact: what the host knows of these.
    """
    n, before, most = kept.shape[2], layer.keys.shape[2], fact.most
    place = torch.arange(n, device=kept.device)
    # What leaves sorts to the front, what stays to the end, each in its order.
    order = torch.where(kept, place + n, place).argsort(-1)[..., n - most :]
    tables = HeadTables.picked(
        order, kept.gather(2, order), entries.position, entries.votes, window, fact.least == most
    )
    if window is not None and fact.least == most:
        tables = replace(tables, lows=fact.lows[:most], high=fact.last)
    for name in ("keys", "values"):
        held = getattr(layer, name)
        index = (before - n + order).to(held.device)[..., None].expand(-1, -1, -1, held.shape[-1])
        setattr(layer, name, held.gather(2, index))
    layer.heads = tables
    if not layer.is_sliding:  # a sliding layer tells its length by a count of its own
        layer.left += before - most
        layer.floor = most
    pack(layer, fact.total)


# Reading a prompt a second time behind itself, for methods that score entries by that.


@contextmanager
def as_before(cache: Cache) -> Any:
    """Whatever is read into a cache within the block is forgotten at its end."""
    names = ("keys", "values", "packed", "cumulative_length", "heads", "expected")
    before = [{name: getattr(layer, name) for name in names if hasattr(layer, name)} for layer in cache.layers]
    try:
        yield
    finally:
        for layer, state in zip(cache.layers, before, strict=True):
            for name, value in state.items():
                setattr(layer, name, value)


def read_again(
    evictor: KVzip,
    ids: Tensor,
    valid: Tensor,
    read: Callable[[Tensor, Tensor, Tensor], dict[int, Tensor]],
) -> dict[int, Tensor]:
    """Scores of a prompt that is read again behind itself, some tokens at a time: by layer ``(B, G, n)``.

    Args:
        evictor: the method.
        ids: ``(B, N)`` tokens of the prompt.
        valid: ``(B, N)`` bool, some token in every row.
        read: reads ids ``(B, c)`` of which some are valid ``(B, c)`` behind the prompt, and which are of its columns
            ``(B, N)`` bool; gives the scores by layer.
    """
    # A row's chunks are counted in its own tokens, wherever padding stands.
    rank = valid.long().cumsum(-1) - 1
    found: dict[int, Tensor] = {}
    length = valid.sum(-1, keepdim=True)
    longest = int(length.max())
    for start in range(0, longest, evictor.chunk or longest):
        stop = start + (evictor.chunk or longest)
        mine = valid & (rank >= start - evictor.overlap) & (rank < stop) & (start < length)
        # Tokens that are read stand on the left, so that nothing is between them and the prompt.
        order = (~mine).long().argsort(dim=-1, stable=True)[:, : int(mine.sum(-1).max())]
        for layer, scores in read(ids.gather(1, order), mine.gather(1, order), mine).items():
            found[layer] = torch.maximum(found[layer], scores) if layer in found else scores
    return found
