"""Clusters of clusters: coarse ones in front, so that not every fine centroid is read for every token.

A coarse cluster knows how many *keys* it stands for, as a fine one does, and its centroid is the mean of those keys. So
at either level a centroid that stands in for keys weighs as much as there are keys (arXiv 2506.13059, section 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quickmerge.attention.clusters import Block, Clusters, Summary, join, summarise
from quickmerge.attention.kmeans import kmeans
from quickmerge.attention.selection import Weights, choose, gather_index, lookup, per_key, rows_at, spread_of
from quickmerge.attention.settings import Multipole

__all__ = ["Candidates", "coarsen", "open_coarse"]


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


def open_coarse(query: Tensor, clusters: Clusters, coarse: Clusters, settings: Multipole) -> tuple[Candidates, Weights]:
    """Open the most promising coarse clusters, until what they hold are as many fine ones as could be read exactly.

    Coarse clusters are ranked and chosen as fine ones are, with their fine clusters as members: at most as many as
    ``budget``, each of which has a key at least. So no fine cluster that the budget would have sufficed for is missed
    because of its number, and what is fetched has a fixed size.

    Args:
        query: ``(B, H, q, g, D)``, scaled, as it is compared with centroids.
        clusters: fine.
        coarse: see `coarsen`.
        settings: ``budget`` of at least 1.

    Returns:
        The fine clusters of the opened ones as candidates for each query, and the weights ``(B, H, q, g, Cc)`` of the
        coarse clusters, 0 for those that were opened.
    """
    found = lookup(query, coarse.key, coarse.count, spread_of(coarse, settings.variance))
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
