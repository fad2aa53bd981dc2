"""k-means of one block of columns after the other, for all rows of a batch that are alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from quickmerge.attention.clusters import Block, Clusters, Summary, summarise
from quickmerge.attention.kmeans import Draws, centred, lloyd, pick
from quickmerge.attention.members import group, means
from quickmerge.attention.nearest import nearest, remembered
from quickmerge.attention.settings import Multipole

__all__ = ["Columns", "Work", "newcomers"]

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
        settled: ``(R, K0)`` bool, see `quickmerge.attention.kmeans.lloyd`.
        draws: over the L points.
        more: how many of the new points begin a cluster.

    Returns:
        Centroids ``(R, K, D)``, and what `quickmerge.attention.nearest.nearest_again` wants to know.
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
