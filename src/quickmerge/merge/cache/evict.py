"""Taking entries out of the layers of a cache, so that their memory is free again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.merge.cache.evictor import Evictor, choose, layer_counts
from quickmerge.merge.cache.heads import HeadTables
from quickmerge.merge.cache.kvzip import KVzip
from quickmerge.merge.cache.packed import pack


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
    if any(_leaves(layer, some, each) for layer, some, each, _ in every):
        for layer, some, each, window in every:
            shrink(layer, some, each, window)


def _leaves(layer: Any, kept: Tensor, entries: Entries) -> bool:
    """Whether an entry of a layer leaves it."""
    return bool(layer.keys.shape[2] > kept.shape[2] or (kept != entries.valid[:, None]).any())


def _counts(evictor: Evictor, held: Sequence[Entries], length: Tensor, windows: Sequence[int | None]) -> Tensor:
    """``(B, L)`` long: how many entries of each row stay in each layer.

    Those that somebody asked for come on top: ``keep`` is a share of the others.
    """
    there = torch.stack([each.valid.sum(-1) for each in held], 1).tolist()
    none = torch.zeros_like(length)
    asked = torch.stack([none if each.asked is None else each.asked.sum(-1) for each in held], 1).tolist()
    out = []
    for row, tokens in enumerate(length.tolist()):
        if tokens < evictor.min_tokens:
            out.append(there[row])
            continue
        full = [tokens if window is None else min(tokens, window - 1) for window in windows]
        others = [[a - b for a, b in zip(each, asked[row], strict=True)] for each in (there[row], full)]
        counts = layer_counts(evictor.keep, *others)
        out.append([min(a + b, c) for a, b, c in zip(counts, asked[row], there[row], strict=True)])
    return torch.tensor(out, device=length.device)


def shrink(layer: Any, kept: Tensor, entries: Entries, window: int | None) -> None:
    """Let one layer keep some of its entries, and note which of them every head holds.

    Args:
        layer: of a cache, with ``keys`` and ``values (B, G, m + n, d)``, of which the first m leave.
        kept: ``(B, G, n)`` bool.
        entries: of the n.
        window: the layer's sliding window, or None.
    """
    n, before = kept.shape[2], layer.keys.shape[2]
    most = int(kept.sum(-1).max())
    place = torch.arange(n, device=kept.device)
    # What leaves sorts to the front, what stays to the end, each in its order.
    order = torch.where(kept, place + n, place).argsort(-1)[..., n - most :]
    tables = HeadTables.picked(order, kept.gather(2, order), entries.position, entries.votes, window)
    for name in ("keys", "values"):
        held = getattr(layer, name)
        index = (before - n + order).to(held.device)[..., None].expand(-1, -1, -1, held.shape[-1])
        setattr(layer, name, held.gather(2, index))
    layer.heads = tables
    if not layer.is_sliding:  # a sliding layer tells its length by a count of its own
        layer.left += before - most
        layer.floor = most
    pack(layer)


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
