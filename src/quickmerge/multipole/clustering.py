"""k-means of one block of columns after the other, for all rows of a batch that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from quickmerge.multipole.clusters import Block, Clusters, Summary, join, summarise
from quickmerge.multipole.settings import Multipole
from quickmerge.multipole.weighted_kmeans import Draws, centred, group, lloyd, means, nearest, pick, remembered

__all__ = ["Columns", "Work", "block_lengths", "bounds", "cluster", "extend", "newcomers"]


Columns: TypeAlias = Tensor | Callable[[Sequence[int], Sequence[int], int], Tensor]
"""``(B, H, n, D)``, or a function of rows, first columns and a length that returns ``(G, H, length, D)``.

It is asked for no column twice but those of the open block, so a function may compute what it returns.
"""


@dataclass
class Work:
    """What is to be clustered, the blocks of each row so far, and the contents of those that are new."""

    keys: Columns
    values: Columns
    size: Tensor | None
    start: list[int]
    settings: Multipole
    blocks: list[list[Block]]
    pieces: list[tuple[int, Block, Summary]] = field(default_factory=list)

    def anew(self, rows: list[int], lengths: tuple[int, ...]) -> None:
        """Cluster blocks of ``lengths`` from nothing, behind those that the rows have."""
        for length in lengths:
            new = []
            for row in rows:
                last = self.blocks[row][-1] if self.blocks[row] else Block(0, 0, 0, 0)
                at, cluster = last.first + last.length, last.cluster + last.clusters
                new.append(Block(at, length, cluster, self.settings.clusters(length)))
            span = self._columns(rows, new)
            x, weight, draws = span.points(self.settings.seed)
            first = pick(x, draws.first(new[0].clusters, x))
            label, settled = lloyd(x, first, self.settings.iterations, draws, weight)
            self._note(rows, new, span, label, settled)

    def grow(self, rows: list[int], clusters: Clusters, length: int) -> None:
        """Let the open block of each row, all alike, grow to ``length`` columns."""
        open_ = [clusters.blocks[row][-1] for row in rows]
        held, had = open_[0].length, open_[0].clusters
        more = min(max(0, self.settings.clusters(length) - had), length - held)
        new = [block._replace(length=length, clusters=had + more) for block in open_]
        span = self._columns(rows, new)
        x, weight, draws = span.points(self.settings.seed)
        label, settled = [], []
        for row, block in zip(rows, open_, strict=True):
            label.append(clusters.labels[row, :, block.first : block.first + held].long() - block.cluster)
            if clusters.settled is not None:
                settled.append(clusters.settled[row, :, block.cluster : block.cluster + had])
        known = torch.cat(settled) if settled else torch.zeros(len(x), had, dtype=torch.bool, device=x.device)
        centroids, state = newcomers(x, weight, torch.cat(label), known, draws, more)
        final, now = lloyd(x, centroids, self.settings.update_iterations, draws, weight, state)
        self._note(rows, new, span, final, now)

    def _columns(self, rows: list[int], blocks: list[Block]) -> _Span:
        first = [self.start[row] + block.first for row, block in zip(rows, blocks, strict=True)]
        length = blocks[0].length
        size = None if self.size is None else _take(self.size[:, None, :, None], rows, first, length)[:, 0, :, 0]
        return _Span(_take(self.keys, rows, first, length), _take(self.values, rows, first, length), size)

    def _note(self, rows: list[int], new: list[Block], span: _Span, label: Tensor, settled: Tensor) -> None:
        """Put what follows from final labels ``(G * H, L)`` down as the next block of each row."""
        shape = (len(rows), len(label) // len(rows), -1)
        part = summarise(*span, label.view(shape), new[0].clusters, self.settings.variance)
        part.settled = settled.view(shape)
        for i, (row, block) in enumerate(zip(rows, new, strict=True)):
            self.blocks[row].append(block)
            self.pieces.append((row, block, part.row(i)))


class _Span(NamedTuple):
    """Some columns of G rows: keys ``(G, H, L, D)``, values ``(G, H, L, Dv)`` and sizes ``(G, L)`` or None."""

    keys: Tensor
    values: Tensor
    size: Tensor | None

    def points(self, seed: int) -> tuple[Tensor, Tensor | None, Draws]:
        """The keys as points to cluster, ``(G * H, L, D)``, their weights ``(G * H, L)`` or None, and draws of them."""
        x = self.keys.detach().to(torch.promote_types(self.keys.dtype, torch.float32)).flatten(0, 1)
        weight = None if self.size is None else self.size.repeat_interleave(self.keys.shape[1], 0)
        return centred(x, weight)[0], weight, Draws(x.shape[1], seed, weight)


def newcomers(
    x: Tensor, weight: Tensor | None, label: Tensor, settled: Tensor, draws: Draws, more: int
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Sequential k-means in one go: each new point joins the nearest of the old and ``more`` new centroids.

    Args:
        x: ``(R, L, D)`` old points and behind them the new ones.
        weight: ``(R, L)`` or None.
        label: ``(R, L0)`` long, of the old points.
        settled: ``(R, K0)`` bool, see `quickmerge.multipole.weighted_kmeans.lloyd`.
        draws: over the L points.
        more: how many of the new points begin a cluster.

    Returns:
        Centroids ``(R, K, D)``, and what `quickmerge.multipole.weighted_kmeans.nearest_again` wants to know.
    """
    held, had = label.shape[1], settled.shape[1]
    w = (None, None) if weight is None else (weight[:, :held], weight[:, held:])
    groups = group(label, had, w[0])
    empty = groups.count == 0
    centroids = torch.where(empty[..., None], pick(x, draws.any(had, x)), means(x[:, :held], groups, w[0]))
    first = draws.order[draws.order >= held].view(len(draws.order), -1)[:, :more].to(x.device)
    centroids = torch.cat([centroids, pick(x, first.expand(len(x), -1))], 1)
    old = remembered(x[:, :held], centroids, label, settled & ~empty)
    joined, least = nearest(x[:, held:], centroids)
    new = group(joined, had + more, w[1])
    # c <- (c n + the sum of the m new points) / (n + m)
    share = torch.where(new.count > 0, new.count / (pad(groups.count, (0, more)) + new.count), 0.0)[..., None]
    centroids = centroids + share.to(x.dtype) * (means(x[:, held:], new, w[1]) - centroids)
    moved = (new.members > 0) | pad(~settled | empty, (0, more))
    return centroids, (torch.cat([label, joined], 1), torch.cat([old, least], 1), moved)


def _take(x: Columns, rows: list[int], first: list[int], length: int) -> Tensor:
    """Columns of some rows: ``(G, H, length, D)``."""
    if not isinstance(x, Tensor):
        return x(rows, first, length)
    if len(rows) == 1:  # without a copy
        return x[rows[0], None, :, first[0] : first[0] + length]
    return torch.stack([x[row, :, at : at + length] for row, at in zip(rows, first, strict=True)])


# Clustering the keys of a layer: a whole prompt block by block, and new tokens a few at a time.
#
# Tokens are clustered in blocks of W consecutive ones, so cost grows with their number and not with its square, and
# what is done with the last block leaves the others alone (arXiv 2506.13059, section 3.3).


def bounds(first: Tensor, length: int, settings: Multipole) -> tuple[Tensor, Tensor]:
    """Which columns of a cache should be clustered: ``start`` and ``end``, each ``(B,)`` long.

    Not the sink, and not the newest tokens: ``interval`` of them up to twice as many, less one.

    Args:
        first: ``(B,)`` long, the first column that holds a token.
        length: n, how many columns there are.
        settings: ``sink`` and ``interval``.
    """
    start = first + settings.sink
    steps = torch.div(length - start, settings.interval, rounding_mode="floor") - 1
    return start, start + steps.clamp_min(0) * settings.interval


def block_lengths(tokens: int, block: int) -> list[int]:
    """Cut tokens into blocks of ``block`` = W, the last of W/2 up to 3 W/2, or of less where there are no more."""
    if tokens == 0:
        return []
    full = max(0, (2 * tokens - block) // (2 * block))
    return [block] * full + [tokens - full * block]


def cluster(
    keys: Columns, values: Columns, size: Tensor | None, start: Tensor, end: Tensor, settings: Multipole
) -> Clusters | None:
    """Cluster the columns ``start`` to ``end`` of each row.

    Args:
        keys: ``(B, H, n, D)``, in the space in which they are to be compared.
        values: ``(B, H, n, Dv)``.
        size: ``(B, n)`` how many tokens each column stands for, 0 for none; default: one each.
        start: ``(B,)`` first column.
        end: ``(B,)`` one past the last; a row with ``end`` equal to ``start`` has nothing to cluster.
        settings: ``ratio``, ``block``, ``iterations``, ``seed`` and ``variance``.

    Returns:
        The clusters, or None where no row has anything to cluster: then all keys have to be read.

    Raises:
        ValueError: if ``end`` lies before ``start``, or there are not so many columns.
    """
    lengths = _lengths(start, end, values)
    if not any(lengths):
        return None
    work = Work(keys, values, size, start.tolist(), settings, [[] for _ in lengths])
    for tail, rows in _alike([tuple(block_lengths(n, settings.block)) for n in lengths]):
        work.anew(rows, tail)
    return join(start, work.blocks, work.pieces)


def extend(
    clusters: Clusters, keys: Columns, values: Columns, size: Tensor | None, new_end: Tensor, settings: Multipole
) -> Clusters:
    """Let the columns behind the clustered ones join the last block of their row.

    A few of the new keys begin clusters of their own, each other one joins the nearest cluster, whose centroid follows,
    and ``update_iterations`` rounds of k-means over the whole block set that right. Where the block would become 3 W/2
    long or longer, it is cut into blocks of W instead, each clustered by itself from nothing, and the last one is open
    again. All blocks before it stay as they are, and their keys are not read.

    Args:
        clusters: as `cluster` or this function made them; they are not changed.
        keys: see `cluster`; also what was clustered before.
        values: as keys.
        size: see `cluster`.
        new_end: ``(B,)``, at least ``clusters.end``.
        settings: as for `cluster`, and ``update_iterations``.

    Raises:
        ValueError: if ``new_end`` lies before ``clusters.end``, or there are not so many columns.
    """
    lengths = _lengths(clusters.start, new_end, values)
    jobs: list[tuple[int, ...]] = []
    for row, length in zip(clusters.blocks, lengths, strict=True):
        last = row[-1] if row else Block(0, 0, 0, 0)
        held = last.first + last.length
        if length < held:
            raise ValueError(f"new_end must lie at or behind the end of the clusters, got {length} columns of {held}")
        tail = block_lengths(length - last.first, settings.block) if length > held else []
        # Nothing, or the lengths of blocks to make anew, or -1, how long the open block becomes, and what it was.
        grows = len(tail) == 1 and last.length > 0
        jobs.append((-1, tail[0], last.length, last.clusters) if grows else tuple(tail))
    if not any(jobs):
        return clusters
    blocks = [list(row[:-1]) if job else list(row) for row, job in zip(clusters.blocks, jobs, strict=True)]
    kept = [len(row) for row in blocks]
    work = Work(keys, values, size, clusters.start.tolist(), settings, blocks)
    for job, rows in _alike(jobs):
        if job[0] < 0:
            work.grow(rows, clusters, job[1])
        else:
            work.anew(rows, job)
    return join(clusters.start, work.blocks, work.pieces, clusters, kept)


def _alike(jobs: Sequence[tuple[int, ...]]) -> list[tuple[tuple[int, ...], list[int]]]:
    """Rows for which the same is to be done, so that it is done at once; not those for which nothing is."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, job in enumerate(jobs):
        if job:
            rows.setdefault(job, []).append(row)
    return list(rows.items())


def _lengths(start: Tensor, end: Tensor, values: Columns) -> list[int]:
    """How many columns each row is to have clustered."""
    pairs = list(zip(start.tolist(), end.tolist(), strict=True))
    limit = values.shape[2] if isinstance(values, Tensor) else None
    for first, last in pairs:
        if first < 0 or last < first or (limit is not None and last > limit and last > first):
            raise ValueError(
                f"columns {first} to {last} cannot be clustered: they must begin at 0 or later, end no earlier than "
                f"they begin, and lie within the cache{'' if limit is None else f' of {limit}'}"
            )
    return [last - first for first, last in pairs]
