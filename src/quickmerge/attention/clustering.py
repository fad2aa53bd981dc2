"""Clustering the keys of a layer: a whole prompt block by block, and new tokens a few at a time.

Tokens are clustered in blocks of W consecutive ones, so cost grows with their number and not with its square, and what
is done with the last block leaves the others alone (arXiv 2506.13059, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quickmerge.attention.blocks import Columns, Work
from quickmerge.attention.clusters import Block, Clusters, join
from quickmerge.attention.settings import Multipole

__all__ = ["Columns", "block_lengths", "bounds", "cluster", "extend"]


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
