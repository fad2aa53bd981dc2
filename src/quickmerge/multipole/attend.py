"""Multipole attention of new tokens: some keys exactly, all others by the centroids of their clusters.

With E the keys that are read exactly (sink, chosen clusters, buffer) and R the clusters that are not chosen,

    out = (sum_E w_n v_n + sum_R W_i u_i) / (sum_E w_n + sum_R W_i),
    w_n = size_n exp(s q . k_n),   W_i = N_i exp(z_i),

where ``z_i`` is the logit of the centroid ``c_i`` and ``u_i`` the centroid of the values (arXiv 2506.13059, section 3).
Models that bound their logits do so in front of each ``exp``: ``c tanh(x / c)`` in place of ``x = s q . k`` and of
``x = z_i``. Models with sinks add ``exp(sink_h)`` of query head h to the denominator, once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.exact import (
    Candidates,
    Part,
    Piece,
    around,
    between,
    exact,
    finish,
    merge,
    open_coarse,
    piece,
    sunk,
)
from quickmerge.multipole.selection import choose, gather_index, layout, lookup, mix, per_key, rows_at
from quickmerge.multipole.settings import Multipole
from quickmerge.multipole.triton_decode import attend_triton, triton_serves

__all__ = ["attend", "attend_and_count", "compute"]

TILE_BYTES = 128 << 20
"""About how much memory the keys, values and logits of the queries that are served together may take."""


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    clusters: Clusters,
    settings: Multipole,
    *,
    scaling: float | None = None,
    query_for_centroids: Tensor | None = None,
    coarse: Clusters | None = None,
    see: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attention of the q newest tokens over the whole cache, see above. Computed in float32 at least.

    The cache has n columns, the last q of which are the new tokens; each of these sees columns up to its own. Columns
    before a row's ``start - sink`` are padding and never read.

    Args:
        query: ``(B, Hq, q, D)``, rotated.
        keys: ``(B, H, n, D)``, rotated; Hq is a multiple of H. Any strides.
        values: ``(B, H, n, Dv)``.
        size: ``(B, n)`` tokens that each column stands for, 0 for padding. Default: one each.
        clusters: of this cache, made before the new tokens came.
        settings: budget and all the rest.
        scaling: s. Default: ``1 / sqrt(D)``.
        query_for_centroids: ``(B, Hq, q, D)``, the query in the space of the clusters. Default: ``query``.
        coarse: the upper one of two levels, see `quickmerge.multipole.exact.coarsen`. Default: one level.
        see: ``(B or 1, q, q)`` bool, what the new tokens see of one another, where they are a tree of drafts. Default:
            each those before it, and itself.
        softcap: c, the bound of the logits. Default: none.
        sinks: ``(Hq,)``, a learned logit for each query head. Default: none.

    Returns:
        ``(B, q, Hq, Dv)`` in the dtype of ``query``; 0 for a query that sees nothing.

    Raises:
        ValueError: if heads or lengths don't fit one another, or ``variance`` is set for clusters without spread.
    """
    return attend_and_count(
        query,
        keys,
        values,
        size,
        clusters,
        settings,
        scaling=scaling,
        query_for_centroids=query_for_centroids,
        coarse=coarse,
        see=see,
        softcap=softcap,
        sinks=sinks,
    )[0]


def attend_and_count(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    clusters: Clusters,
    settings: Multipole,
    *,
    scaling: float | None = None,
    query_for_centroids: Tensor | None = None,
    coarse: Clusters | None = None,
    see: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend`, and how many clustered columns each query read exactly: ``(B, H, q)`` long for each key-value head."""
    _check(query, keys, values, size, clusters, query_for_centroids)
    if sinks is not None and tuple(sinks.shape) != (query.shape[1],):
        raise ValueError(f"sinks must be one for each of the {query.shape[1]} query heads, got {tuple(sinks.shape)}")
    # What the kernels don't compute is left to torch: draft trees, bounded logits, sinks.
    if see is None and softcap is None and sinks is None and triton_serves(query, keys, values, clusters, coarse):
        return attend_triton(
            query, keys, values, size, clusters, settings, scaling=scaling, query_for_centroids=query_for_centroids
        )
    bounds = row_bounds(clusters, settings.sink)
    _check_end(keys, query.shape[2], bounds)
    return compute(
        query, keys, values, size, clusters, settings, bounds, scaling, query_for_centroids, coarse, see, softcap, sinks
    )


def row_bounds(clusters: Clusters, sink: int) -> list[tuple[int, int, int]]:
    """For each row the first column of its sink, of its clusters, and of its buffer."""
    bounds = []
    for start, blocks in zip(clusters.start.tolist(), clusters.blocks, strict=True):
        bounds.append((max(0, start - sink), start, start + sum(block.length for block in blocks)))
    return bounds


def compute(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    clusters: Clusters,
    settings: Multipole,
    bounds: Sequence[tuple[int, int, int]],
    scaling: float | None = None,
    query_for_centroids: Tensor | None = None,
    coarse: Clusters | None = None,
    see: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`attend_and_count` with the bounds of the rows as numbers, see `row_bounds`.

    Nothing is looked up on the device from here on, and it all compiles.
    """
    heads, new, n = keys.shape[1], query.shape[2], keys.shape[2]
    near = layout(query, heads, scaling)
    far = near if query_for_centroids is None else layout(query_for_centroids, heads, scaling)
    everything = settings.select == "budget" and settings.budget >= clusters.width
    if everything:
        low = min(first for first, _, _ in bounds)
        first = (clusters.start - settings.sink).clamp_min(0) if any(row[0] != low for row in bounds) else None
        pieces = [between(keys, values, size, new, near.dtype, low, n, first, see)]
    else:
        pieces = around(keys, values, size, new, near.dtype, bounds, see)
    read_all = torch.where(clusters.count > 0, clusters.members, 0).sum(-1)
    outs, counts = [], []
    step = max(1, TILE_BYTES // _bytes_per_query(near, values, pieces, clusters, settings, coarse, everything))
    for begin in range(0, new, step):
        here = slice(begin, begin + step)
        query_rows = near[:, :, here]
        chosen: list[Piece] = []
        parts: list[Part] = []
        kept = read_all[..., None].expand(-1, -1, query_rows.shape[2])
        if not everything:
            chosen, parts, kept = _multipole(far[:, :, here], keys, values, size, clusters, settings, coarse, softcap)
        read = exact(query_rows, [*(each.of(here) for each in pieces), *chosen], softcap)
        beside = [] if sinks is None else [sunk(sinks, read)]
        outs.append(finish(merge([read, *parts, *beside])))
        counts.append(kept)
    out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
    return out.permute(0, 2, 1, 3, 4).flatten(2, 3).to(query.dtype), torch.cat(counts, 2)


def _multipole(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    clusters: Clusters,
    settings: Multipole,
    coarse: Clusters | None,
    softcap: float | None,
) -> tuple[list[Piece], list[Part], Tensor]:
    """The members of the chosen clusters, the centroids of the others, and how many members these are ``(B, H, q)``."""
    if coarse is not None and settings.budget == 0:
        clusters, coarse = coarse, None  # nothing is opened, and the coarse centroids stand for everything
    closed = None
    if coarse is None:
        candidates = Candidates.all(clusters, settings.variance)
    else:
        candidates, closed = open_coarse(query, clusters, coarse, settings, softcap)
    found = lookup(query, candidates.key, candidates.count, candidates.spread, softcap)
    total = found.total
    if closed is not None:
        total = total + closed.total * (closed.top - found.top).clamp_max(80).exp()  # 80: no overflow, and no matter
    share = per_key(found, candidates.count, total)
    choice = choose(share, candidates.members, candidates.count, settings.budget, settings.select, settings.top_p)
    pieces, parts = [], []
    width = min(settings.budget, clusters.width)
    if width:
        index, valid = gather_index(clusters.order, candidates.offset, choice, width)
        column = (index + clusters.start[:, None, None, None]).clamp_max(keys.shape[2] - 1)
        own = None if size is None else size.gather(1, column.flatten(1)).view_as(column)[:, :, :, None]
        hidden = ~valid[:, :, :, None]
        pieces.append(piece(rows_at(keys, column), rows_at(values, column), own, hidden, query.dtype))
    if settings.replacement:
        rest = found.weight.masked_fill(choice.mask(share.shape[-1])[:, :, :, None], 0)
        parts.append(Part(mix(rest, candidates.value), found.top, rest.sum(-1, keepdim=True)))
        if closed is not None and coarse is not None:
            parts.append(Part(mix(closed.weight, coarse.value), closed.top, closed.total))
    return pieces, parts, choice.rows.sum(-1)


def _bytes_per_query(
    query: Tensor,
    values: Tensor,
    pieces: Sequence[Piece],
    clusters: Clusters,
    settings: Multipole,
    coarse: Clusters | None,
    everything: bool,
) -> int:
    """What serving one query of each row takes: three tensors of logits, and the keys and values fetched for it."""
    b, h, _, g, d = query.shape
    logits, fetched = sum(len(each) for each in pieces), 0
    if not everything:
        fetched = min(settings.budget, clusters.width)
        logits += fetched + len(clusters if coarse is None else coarse)
        if coarse is not None:
            fetched += min(settings.budget, len(clusters))
    return query.element_size() * b * h * (3 * g * logits + fetched * (d + values.shape[-1]) + 1)


def _check(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    clusters: Clusters,
    far: Tensor | None,
) -> None:
    """Raise ValueError for what can't belong together, by the shapes alone."""
    b, h, n, _ = keys.shape
    if query.shape[1] % h:
        raise ValueError(f"query must have a multiple of the {h} key-value heads, got {query.shape[1]}")
    for name, got, wanted in (
        ("query", (query.shape[0], query.shape[3]), (b, keys.shape[3])),
        ("query_for_centroids", tuple((query if far is None else far).shape), tuple(query.shape)),
        ("values", tuple(values.shape[:3]), (b, h, n)),
        ("size", (b, n) if size is None else tuple(size.shape), (b, n)),
        ("clusters", tuple(clusters.labels.shape[:2]), (b, h)),
    ):
        if got != wanted:
            raise ValueError(f"{name} must match keys of shape {tuple(keys.shape)} in {wanted}, got {got}")


def _check_end(keys: Tensor, new: int, bounds: Sequence[tuple[int, int, int]]) -> None:
    """Raise ValueError if a new token is in a cluster."""
    last, n = max((end for _, start, end in bounds if end > start), default=0), keys.shape[2]
    if last > n - new:
        raise ValueError(
            f"clusters must end before the {new} new tokens of {n} columns, got column {last} as their end"
        )
