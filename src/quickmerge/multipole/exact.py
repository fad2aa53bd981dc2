"""Keys that are read one by one: sink and buffer of every row, and softmaxes over parts of the keys put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quickmerge.multipole.clusters import Block, Clusters, Summary, join, summarise
from quickmerge.multipole.selection import (
    Weights,
    capped,
    choose,
    gather_index,
    lookup,
    mix,
    per_key,
    products,
    rows_at,
    spread_of,
    weigh,
)
from quickmerge.multipole.settings import Multipole
from quickmerge.multipole.weighted_kmeans import kmeans

__all__ = [
    "Candidates",
    "Part",
    "Piece",
    "around",
    "between",
    "coarsen",
    "exact",
    "finish",
    "merge",
    "open_coarse",
    "piece",
    "sunk",
]


class Part(NamedTuple):
    """A softmax over some of the keys: ``out (..., Dv) = sum exp(logit - top) v``, ``top`` and ``total (..., 1)``."""

    out: Tensor
    top: Tensor
    total: Tensor


def merge(parts: Sequence[Part]) -> Part:
    """One softmax over the keys of all parts. Order and grouping don't matter."""
    if len(parts) == 1:
        return parts[0]
    top = torch.cat([part.top for part in parts], -1).amax(-1, keepdim=True)
    shares = [(part.top - top).exp() for part in parts]
    out, total = parts[0].out * shares[0], parts[0].total * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        out, total = out + part.out * share, total + part.total * share
    return Part(out, top, total)


def finish(part: Part) -> Tensor:
    """The mean of the values by their weights, 0 where nothing has weight."""
    return part.out / torch.where(part.total > 0, part.total, 1.0)


def sunk(sinks: Tensor, like: Part) -> Part:
    """The learned logits ``(Hq,)`` of a model's sinks, one for each query head: weight in the denominator, no value.

    Args:
        sinks: ``s_h``; head h of a key-value head's group is the h-th of its g, as in `layout`.
        like: what it stands beside, of shapes ``(B, H, q, g, ...)``.
    """
    b, h, q, g, _ = like.top.shape
    top = sinks.to(like.top.dtype).view(1, h, 1, g, 1).expand(b, h, q, g, 1)
    return Part(torch.zeros_like(like.out), top, torch.ones_like(top))


@dataclass(frozen=True)
class Piece:
    """Keys and values for all queries ``(B, H, w, D)``, or some for each ``(B, H, q, w, D)``.

    ``bias`` is added to their logits ``(B, H, q, g, w)``; where ``hidden``, there is no key. Both may have fewer
    entries and are repeated; None: 0, and nowhere.
    """

    key: Tensor
    value: Tensor
    bias: Tensor | None = None
    hidden: Tensor | None = None

    def __len__(self) -> int:
        return self.key.shape[-2]

    def of(self, queries: slice) -> Piece:
        """The same keys, for some of the queries that share them."""
        if self.hidden is None or self.hidden.shape[2] == 1:
            return self
        return replace(self, hidden=self.hidden[:, :, queries])


def piece(key: Tensor, value: Tensor, size: Tensor | None, hidden: Tensor | None, dtype: torch.dtype) -> Piece:
    """Keys that stand for ``size`` tokens each, 0 for no key at all; ``size`` stands beside the logits of ``dtype``."""
    if size is None:
        return Piece(key, value, None, hidden)
    absent = size <= 0
    bias = torch.where(absent, 1, size).to(dtype).log()
    return Piece(key, value, bias, absent if hidden is None else absent | hidden)


def exact(query: Tensor, pieces: Sequence[Piece], softcap: float | None = None) -> Part:
    """The softmax of ``query (B, H, q, g, D)``, scaled, over all pieces; see `capped` for ``softcap``."""
    logits = []
    for each in pieces:
        z = capped(products(query, each.key), softcap)
        z = z if each.bias is None else z + each.bias
        logits.append(z if each.hidden is None else z.masked_fill(each.hidden, -torch.inf))
    found = weigh(torch.cat(logits, -1) if len(logits) > 1 else logits[0])
    shares = torch.split(found.weight, [len(each) for each in pieces], -1)
    out = mix(shares[0], pieces[0].value)
    for share, each in zip(shares[1:], pieces[1:], strict=True):
        out = out + mix(share, each.value)
    return Part(out, found.top, found.total)


def between(
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    new: int,
    dtype: torch.dtype,
    begin: int,
    end: int,
    first: Tensor | None,
    see: Tensor | None = None,
) -> Piece:
    """Columns ``begin..end - 1`` of every row, without a copy.

    Args:
        keys, values: ``(B, H, n, D)``, of which the last ``new`` columns see each other only backwards.
        size: ``(B, n)``.
        new: q.
        dtype: of the logits.
        begin, end: columns.
        first: ``(B,)`` columns before which there is nothing in a row. Default: 0.
        see: ``(B or 1, new, new)`` bool, what the new columns see of one another if not only what is before them.
    """
    here = slice(begin, end)
    column = torch.arange(begin, min(end, keys.shape[2]), device=keys.device)[None]
    own = None if size is None else size[:, None, None, None, here]
    hidden = _hidden(column, keys.shape[2], new, first, see)
    return piece(keys[:, :, here], values[:, :, here], own, hidden, dtype)


def around(
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    new: int,
    dtype: torch.dtype,
    bounds: Sequence[tuple[int, int, int]],
    see: Tensor | None = None,
) -> list[Piece]:
    """Sink and buffer: what lies before and behind the clustered columns of each row.

    Rows that are alike are read where they lie; of others the columns are fetched, so that a row is not read from where
    a longer one begins.

    Args:
        keys, values, size, new, dtype, see: see `between`.
        bounds: for each row, first column of the sink, of the clusters, and of the buffer.
    """
    n = keys.shape[2]
    if all(row == bounds[0] for row in bounds):
        first, start, end = bounds[0]
        spans = [(a, b) for a, b in ((first, min(start, n)), (end, n)) if a < b]
        return [between(keys, values, size, new, dtype, a, b, None, see) for a, b in spans]
    place = torch.arange(max(start - first + max(0, n - end) for first, start, end in bounds), device=keys.device)
    begin, middle, last = (torch.tensor(x, device=keys.device)[:, None] for x in zip(*bounds, strict=True))
    column = torch.where(place < middle - begin, begin + place, last + place - (middle - begin))
    at = column.clamp_max(n - 1)
    fetch = at[:, None].expand(-1, keys.shape[1], -1)
    own = None if size is None else size.gather(1, at)[:, None, None, None]
    return [piece(rows_at(keys, fetch), rows_at(values, fetch), own, _hidden(column, n, new, see=see), dtype)]


def _hidden(
    column: Tensor, columns: int, new: int, first: Tensor | None = None, see: Tensor | None = None
) -> Tensor | None:
    """Which ``column (B or 1, w)`` each of the ``new`` last ones does not see: ``(B or 1, 1, new, 1, w)``."""
    begin = columns - new
    if see is None:
        own = torch.arange(begin, columns, device=column.device)
        hidden = column[:, None] > own[None, :, None]
    else:
        rows = max(len(column), len(see))
        at = (column - begin).clamp(0, new - 1)[:, None].expand(rows, new, -1)
        hidden = (column >= begin)[:, None] & ~see.expand(rows, -1, -1).gather(2, at)
        hidden = hidden | (column >= columns)[:, None]
    if first is not None:
        hidden = hidden | (column[:, None] < first[:, None, None])
    return hidden[:, None, :, None]


# Clusters of clusters: coarse ones in front, so that not every fine centroid is read for every token.
#
# A coarse cluster knows how many *keys* it stands for, as a fine one does, and its centroid is the mean of those keys.
# So at either level a centroid that stands in for keys weighs as much as there are keys (arXiv 2506.13059, section
# 3.4).


@dataclass(frozen=True)
class Candidates:
    """Fine clusters that may be read exactly: those of a layer ``(B, H, C)``, or some for each query ``(B, H, q, C)``.

    ``key``, ``value`` centroids; ``count``, ``members``, ``offset`` and ``spread`` as in `Clusters`; a candidate of
    count 0 is none.
    """

    key: Tensor
    value: Tensor
    count: Tensor
    members: Tensor
    offset: Tensor
    spread: Tensor | None

    @classmethod
    def all(cls, clusters: Clusters, variance: bool) -> Candidates:
        """Every cluster."""
        spread = spread_of(clusters, variance)
        return cls(clusters.key, clusters.value, clusters.count, clusters.members, clusters.offset, spread)


def coarsen(clusters: Clusters, settings: Multipole, before: tuple[Clusters, Clusters] | None = None) -> Clusters:
    """The coarse clusters of fine ones: `Clusters` whose columns are the fine clusters.

    The clusters of each block are clustered by themselves, weighted by their counts. ``members`` says how many fine
    clusters a coarse one has, those without keys not among them; ``count``, how many keys these have; ``spread``, how
    far the keys lie from the coarse centroid.

    Args:
        clusters: fine.
        settings: ``coarse`` is the number of coarse clusters for each key.
        before: the fine clusters that these were extended from, and what this function made of them. What it made of
            blocks that were closed even then is taken over.

    Raises:
        ValueError: if ``settings.coarse`` is None.
    """
    if settings.coarse is None:
        raise ValueError("coarse must be a number of clusters for each key to make two levels, got None")
    old = None if before is None else before[1]
    blocks: list[list[Block]] = []
    pieces: list[tuple[int, Block, Summary]] = []
    kept: list[int] = []
    for row, fine in enumerate(clusters.blocks):
        closed = 0 if before is None else _closed(before[0].blocks[row], fine)
        own = [] if old is None else list(old.blocks[row][:closed])
        kept.append(closed)
        for block in fine[closed:]:
            at = own[-1].cluster + own[-1].clusters if own else 0
            wanted = min(block.clusters, max(1, int(block.length * settings.coarse)))
            own.append(Block(block.cluster, block.clusters, at, wanted))
            pieces.append((row, own[-1], _coarse_block(clusters, row, own[-1], settings)))
        blocks.append(own)
    made = join(torch.zeros_like(clusters.start), blocks, pieces, old, kept)
    return replace(made, labels=torch.where(clusters.count > 0, made.labels, -1))


def _closed(before: list[Block], now: list[Block]) -> int:
    """How many blocks were closed already, and still are the same."""
    same = 0
    for a, b in zip(before[:-1], now, strict=False):
        if a != b:
            break
        same += 1
    return same


def _coarse_block(clusters: Clusters, row: int, block: Block, settings: Multipole) -> Summary:
    """One block of one row, its heads told apart by their own counts."""
    here = slice(block.first, block.first + block.length)
    key, value, count = (x[row, :, here] for x in (clusters.key, clusters.value, clusters.count))
    labels, _ = kmeans(key, block.clusters, settings.iterations, weight=count, seed=settings.seed)
    # A fine cluster without keys is a member of none: it goes into one more cluster, which is then left out.
    labels = torch.where(count > 0, labels.long(), block.clusters)
    wants = clusters.spread is not None
    found = summarise(key[:, None], value[:, None], count, labels[:, None], block.clusters + 1, wants)
    spread = None
    if clusters.spread is not None and found.spread is not None:
        within = torch.zeros_like(found.count[:, 0]).scatter_add_(1, labels, clusters.spread[row, :, here] * count)
        # Koenig and Huygens: distances from the coarse centroid are those from the fine ones and those of these.
        spread = found.spread + (within / found.count[:, 0].clamp_min(1))[:, None]
    own = slice(block.clusters)
    return Summary(
        labels=found.labels.transpose(0, 1),
        key=found.key.transpose(0, 1)[:, :, own],
        value=found.value.transpose(0, 1)[:, :, own],
        members=found.members.transpose(0, 1)[:, :, own],
        count=found.count.transpose(0, 1)[:, :, own],
        order=found.order.transpose(0, 1),
        offset=found.offset.transpose(0, 1)[:, :, own],
        spread=None if spread is None else spread.transpose(0, 1)[:, :, own],
    )


def open_coarse(
    query: Tensor, clusters: Clusters, coarse: Clusters, settings: Multipole, softcap: float | None = None
) -> tuple[Candidates, Weights]:
    """Open the most promising coarse clusters, until what they hold are as many fine ones as could be read exactly.

    Coarse clusters are ranked and chosen as fine ones are, with their fine clusters as members: at most as many as
    ``budget``, each of which has a key at least. So no fine cluster that the budget would have sufficed for is missed
    because of its number, and what is fetched has a fixed size.

    Args:
        query: ``(B, H, q, g, D)``, scaled, as it is compared with centroids.
        clusters: fine.
        coarse: see `coarsen`.
        settings: ``budget`` of at least 1.
        softcap: see `quickmerge.multipole.selection.capped`.

    Returns:
        The fine clusters of the opened ones as candidates for each query, and the weights ``(B, H, q, g, Cc)`` of the
        coarse clusters, 0 for those that were opened.
    """
    found = lookup(query, coarse.key, coarse.count, spread_of(coarse, settings.variance), softcap)
    width = min(settings.budget, len(clusters))
    choice = choose(per_key(found, coarse.count), coarse.members, coarse.count, width)
    index, valid = gather_index(coarse.order, coarse.offset, choice, width)
    weight = found.weight.masked_fill(choice.mask(len(coarse))[:, :, :, None], 0)
    closed = Weights(weight, found.top, weight.sum(-1, keepdim=True))

    def of(x: Tensor) -> Tensor:
        return x.gather(2, index.flatten(2)).view_as(index)

    spread = spread_of(clusters, settings.variance)
    candidates = Candidates(
        rows_at(clusters.key, index),
        rows_at(clusters.value, index),
        torch.where(valid, of(clusters.count), 0),
        torch.where(valid, of(clusters.members), 0),
        of(clusters.offset),
        None if spread is None else of(spread),
    )
    return candidates, closed
