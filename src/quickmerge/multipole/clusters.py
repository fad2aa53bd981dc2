"""Clusters of the keys of one layer: who is a member of which, and what each cluster is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from quickmerge.multipole.weighted_kmeans import group, means, pick

COLUMNS = ("labels", "order")
"""The fields that have an entry for each column; the others have one for each cluster."""

__all__ = ["Block", "Clusters", "Summary", "join", "side_by_side", "summarise"]


class Block(NamedTuple):
    """Tokens of one row that were clustered together: columns counted from the row's start, and their clusters."""

    first: int
    length: int
    cluster: int
    clusters: int


@dataclass
class Summary:
    """What follows from the labels of one block of G rows; see `Clusters` for the fields. Columns start at 0."""

    labels: Tensor
    key: Tensor
    value: Tensor
    members: Tensor
    count: Tensor
    order: Tensor
    offset: Tensor
    spread: Tensor | None
    settled: Tensor | None = None

    def row(self, index: int) -> Summary:
        """One of the rows."""
        picked: dict[str, Any] = {}
        for field in fields(self):
            x = getattr(self, field.name)
            picked[field.name] = None if x is None else x[index : index + 1]
        return Summary(**picked)


@dataclass
class Clusters:
    """The clusters of one layer: H key-value heads, room for M clustered columns and C clusters in every row.

    Nothing is changed in place: extending and cropping make new ones. A cluster may have no members, as those have that
    fill up a row of fewer than C; then ``members`` and ``count`` are 0 and its centroids are zeros. Where all members
    are of size 0, ``count`` and centroids are.

    ``start (B,)`` long: first clustered column of the cache in each row, behind padding and sink.
    ``end (B,)`` long: one past the last clustered column; equal to ``start`` in a row where nothing is clustered.
    ``labels (B, H, M)`` int32: cluster of column ``start + j``, -1 behind the end of a shorter row.
    ``key (B, H, C, D)``, ``value (B, H, C, Dv)``: means of the members weighted by their sizes, in the dtypes of the
    cache (the keys in the space in which they were clustered).
    ``members (B, H, C)`` int32: how many columns a cluster has.
    ``count (B, H, C)`` float32: how many tokens these stand for, the sum of their sizes.
    ``order (B, H, M)`` int32: columns counted from ``start``, sorted by cluster and then by column; 0 behind the end.
    ``offset (B, H, C)`` int32: cluster i is ``order[offset_i : offset_i + members_i]``.
    ``blocks``: for each row, which columns were clustered together. The last one is open: new tokens join it.
    ``spread (B, H, C)`` float32: mean squared distance of the members to the key centroid; None if not asked for.
    ``settled (B, H, C)`` bool: the labels are the nearest of centroids that for these clusters are the present ones.
    Only `quickmerge.multipole.clustering` reads it, to compare fewer keys with fewer centroids; None: not known.
    """

    start: Tensor
    end: Tensor
    labels: Tensor
    key: Tensor
    value: Tensor
    members: Tensor
    count: Tensor
    order: Tensor
    offset: Tensor
    blocks: list[list[Block]]
    spread: Tensor | None = None
    settled: Tensor | None = None

    def __len__(self) -> int:
        """C, the number of clusters that a row can have."""
        return self.key.shape[2]

    @property
    def width(self) -> int:
        """M, the number of clustered columns that a row can have."""
        return self.labels.shape[2]

    @property
    def bytes(self) -> int:
        """Memory that the clusters take beside the cache."""
        tensors = (getattr(self, f.name) for f in fields(self))
        return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))

    @classmethod
    def from_labels(
        cls,
        keys: Tensor,
        values: Tensor,
        labels: Tensor,
        start: Tensor,
        clusters: int,
        size: Tensor | None = None,
        spread: bool = False,
    ) -> Clusters:
        """Clusters from labels found elsewhere, as one open block a row.

        Args:
            keys: ``(B, H, n, D)``, all columns of the cache, in the space of the clusters.
            values: ``(B, H, n, Dv)``.
            labels: ``(B, H, M)`` whole numbers below ``clusters``, the same number of them not negative in every head.
            start: ``(B,)`` column of ``labels[..., 0]``.
            clusters: C.
            size: ``(B, n)`` tokens that each column stands for; default: one each.
            spread: whether to measure ``spread``.
        """
        blocks: list[list[Block]] = []
        pieces: list[tuple[int, Block, Summary]] = []
        for row, first in enumerate(start.tolist()):
            length = int((labels[row, 0] >= 0).sum())
            here = slice(first, first + length)
            own = None if size is None else size[row, None, here]
            label = labels[row, None, :, :length]
            part = summarise(keys[row, None, :, here], values[row, None, :, here], own, label, clusters, spread)
            blocks.append([Block(0, length, 0, clusters)])
            pieces.append((row, blocks[-1][0], part))
        return join(start, blocks, pieces)

    def crop(self, columns: int) -> Clusters | None:
        """What is left when the cache is cut to its first ``columns``; None if that is no cluster at all.

        Blocks that lie wholly before that column stay as they are, and the last of them is the open one. What a block
        that is cut keeps of its tokens is clustered no more, until it is clustered anew.
        """
        kept = []
        for row, first in zip(self.blocks, self.start.tolist(), strict=True):
            kept.append(sum(first + b.first + b.length <= columns for b in row))
        if all(n == len(row) for n, row in zip(kept, self.blocks, strict=True)):
            return self
        if not any(kept):
            return None
        return join(self.start, [row[:n] for n, row in zip(kept, self.blocks, strict=True)], (), self, kept)

    def select_rows(self, index: Tensor) -> Clusters:
        """The rows ``index (B',)``, in that order, some perhaps several times (beams, repeated prompts)."""
        rows = index.tolist()
        new = {f.name: getattr(self, f.name) for f in fields(self)}
        new = {k: v.index_select(0, index.to(v.device)) if isinstance(v, Tensor) else v for k, v in new.items()}
        new["blocks"] = [list(self.blocks[row]) for row in rows]
        return Clusters(**new)


def summarise(
    keys: Tensor, values: Tensor, size: Tensor | None, labels: Tensor, clusters: int, spread: bool = False
) -> Summary:
    """Everything that follows from labels, here and nowhere else: counts, centroids and the order of the members.

    Args:
        keys: ``(G, H, L, D)``.
        values: ``(G, H, L, Dv)``.
        size: ``(G, L)``, or None: one each.
        labels: ``(G, H, L)`` whole numbers in 0..clusters - 1.
        clusters: K.
        spread: whether to measure ``spread``.

    Returns:
        Members, counts and centroids of the K clusters, ``(G, H, K)`` or ``(G, H, K, D)``. A cluster without members,
        or with members of size 0 alone, has zeros for centroids.
    """
    g, h, length = labels.shape
    weight = None if size is None else size[:, None].expand(g, h, length).reshape(g * h, length)
    labels = labels.reshape(g * h, length).long()

    def flat(x: Tensor) -> Tensor:
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32)).flatten(0, 1)
        # What does not count may hold anything, and nothing times infinity is not nothing.
        return x if weight is None else torch.where(weight[..., None] > 0, x, 0.0)

    groups = group(labels, clusters, weight)
    key = means(flat(keys), groups, weight)
    value = means(flat(values), groups, weight)
    far = None
    if spread:
        away = (flat(keys) - pick(key, labels)).square().sum(-1, keepdim=True)
        far = means(away, groups, weight).view(g, h, -1).float()
    return Summary(
        labels=labels.view(g, h, -1).int(),
        key=key.view(g, h, clusters, -1).to(keys.dtype),
        value=value.view(g, h, clusters, -1).to(values.dtype),
        members=groups.members.view(g, h, -1).int(),
        count=groups.count.view(g, h, -1).float(),
        order=groups.order.view(g, h, -1).int(),
        offset=groups.offset.view(g, h, -1).int(),
        spread=far,
    )


def side_by_side(parts: Sequence[Summary]) -> Summary:
    """Summaries of one block for some heads each, put together."""
    if len(parts) == 1:
        return parts[0]
    whole: dict[str, Any] = {}
    for field in fields(Summary):
        each = [getattr(part, field.name) for part in parts]
        whole[field.name] = None if each[0] is None else torch.cat(each, 1)
    return Summary(**whole)


def join(
    start: Tensor,
    blocks: list[list[Block]],
    pieces: Sequence[tuple[int, Block, Summary]],
    old: Clusters | None = None,
    kept: Sequence[int] | None = None,
) -> Clusters:
    """Put the blocks of each row side by side, and rows of different length below one another.

    Args:
        start: ``(B,)`` first clustered column of each row.
        blocks: the blocks of each row, those that are kept and those that are new.
        pieces: row, place and contents (with G = 1) of what is new.
        old: where kept blocks are found.
        kept: how many blocks of each row are kept, from the first on. Default: none.
    """
    like = old if old is not None else pieces[0][2]
    total = [(sum(b.length for b in row), sum(b.clusters for b in row)) for row in blocks]
    shape = (len(blocks), like.labels.shape[1])
    columns, clusters = (*shape, max(m for m, _ in total)), (*shape, max(c for _, c in total))
    new: dict[str, Tensor] = {"labels": like.labels.new_full(columns, -1), "order": like.order.new_zeros(columns)}
    new |= {name: like_.new_zeros(clusters) for name, like_ in (("members", like.members), ("count", like.count))}
    new |= {name: x.new_zeros((*clusters, x.shape[-1])) for name, x in (("key", like.key), ("value", like.value))}
    length = torch.tensor([m for m, _ in total], device=start.device)
    new["offset"] = length.to(like.offset)[:, None, None].expand(clusters).contiguous()
    optional = {"spread": like.spread, "settled": like.settled}
    new |= {name: x.new_zeros(clusters) for name, x in optional.items() if x is not None}
    for row, n in enumerate(kept or ()):
        if old is not None and n:
            last = blocks[row][n - 1]
            m, c = last.first + last.length, last.cluster + last.clusters
            for name, x in new.items():
                to = m if name in COLUMNS else c
                x[row, :, :to] = getattr(old, name)[row, :, :to]
    for row, block, part in pieces:
        for name, x in new.items():
            first, n = (block.first, block.length) if name in COLUMNS else (block.cluster, block.clusters)
            shift = block.cluster if name == "labels" else block.first if name in ("order", "offset") else 0
            piece = getattr(part, name)[0]
            x[row, :, first : first + n] = piece + shift if shift else piece
    return Clusters(start=start, end=start + length, blocks=blocks, **new)
