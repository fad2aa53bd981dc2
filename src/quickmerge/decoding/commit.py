"""The cache after a step: what was accepted moves in front, the rest is dropped, and rows may leave."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

__all__ = ["Columns", "commit", "compact", "lay_out", "select"]

WASTE = 4
"""Rows are compacted when that leaves at least one column in so many out: as much work as reading one more token,
since a dynamic cache copies itself whenever something is added."""


@dataclass(frozen=True)
class Columns:
    """What the n columns of a cache hold. All layers hold the same.

    Attributes:
        valid: ``(B, n)`` bool, whether a column holds a token of its row's text.
        place: ``(B, n)`` long, which one: its column in ``generate``'s sequences; anything where it holds none.
        length: ``(B,)`` long, the place of the next token to be read, the root of the next tree.
        offset: ``(B,)`` long, what is added to a place to get the position that the model is told; ``(k, B)`` where
            it counts in k directions.
        holes: whether any column of any row holds none.
    """

    valid: Tensor
    place: Tensor
    length: Tensor
    offset: Tensor
    holes: bool

    @property
    def width(self) -> int:
        """Columns of the cache."""
        return self.valid.shape[1]


def commit(cache: Cache, columns: Columns, paths: Sequence[Sequence[int]]) -> Columns:
    """Keep the accepted nodes of the trees that were just read behind ``columns``.

    They move to the columns right behind the old ones; a row that accepted fewer than another leaves holes. Only
    columns of trees are moved: the text before them is not touched.

    Args:
        cache: holds the columns and, behind them, those of the trees.
        columns: what it held before.
        paths: for each row the nodes on the accepted path from the root on, none for a row that takes nothing.

    Returns:
        What the cache holds now.
    """
    device, before = columns.valid.device, columns.width
    most = max(len(path) for path in paths)
    index = torch.tensor([[*path, *[0] * (most - len(path))] for path in paths], device=device)
    count = torch.tensor([len(path) for path in paths], device=device)
    # Nodes in front of the first one that has to move are where they belong.
    still = min(_in_place(path, most) for path in paths)
    moving = index[:, still:]

    def keep(x: Tensor) -> Tensor:
        if still < most:
            # The layer made this tensor when the trees were read, so it is nobody else's.
            x[:, :, before + still : before + most] = _take(x[:, :, before:], moving)
        return x[:, :, : before + most]

    _each_layer(cache, keep)
    step = torch.arange(most, device=device)
    return Columns(
        torch.cat([columns.valid, step < count[:, None]], 1),
        torch.cat([columns.place, columns.length[:, None] + step], 1),
        columns.length + count,
        columns.offset,
        columns.holes or len({len(path) for path in paths}) > 1,
    )


def compact(cache: Cache, columns: Columns) -> Columns:
    """Close the holes that no row needs, if that makes the cache shorter by a quarter at least."""
    if not columns.holes:
        return columns
    longest = int(columns.valid.sum(1).max())
    if (columns.width - longest) * WASTE < columns.width:
        return columns
    index = (~columns.valid).long().argsort(dim=1, stable=True)[:, :longest]
    _each_layer(cache, lambda x: _take(x, index))
    valid = columns.valid.gather(1, index)
    place = columns.place.gather(1, index)
    return Columns(valid, place, columns.length, columns.offset, not bool(valid.all()))


def select(cache: Cache, columns: Columns, index: Tensor) -> Columns:
    """Go on with the rows ``index (R,)`` alone."""
    cache.batch_select_indices(index)
    valid = columns.valid[index]
    holes = columns.holes and not bool(valid.all())
    return Columns(valid, columns.place[index], columns.length[index], columns.offset[..., index], holes)


def lay_out(cache: Cache, columns: Columns, width: int) -> Columns:
    """Put every token in the column of its place, as ``generate`` would have: ``width`` columns, zeros between them."""
    source = columns.place.new_full((len(columns.valid), width + 1), -1)
    # Whatever has no place in the new cache goes to a column more, which is cut off.
    target = torch.where(columns.valid & (columns.place < width), columns.place, width)
    source.scatter_(1, target, torch.arange(columns.width, device=target.device).expand_as(target))
    source = source[:, :width]
    there = source >= 0
    _each_layer(cache, lambda x: _take(x, source.clamp_min(0)) * there.to(x.device)[:, None, :, None])
    place = torch.arange(width, device=target.device).expand(len(there), -1)
    length = columns.length.clamp_max(width)
    return Columns(there, place, length, columns.offset, not bool(there.all()))


def _in_place(path: Sequence[int], most: int) -> int:
    """How many nodes of a path come before the first one that has to move, ``most`` if none has to."""
    return next((i for i, node in enumerate(path) if node != i), most)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Columns ``index (B, K)`` of keys or values ``(B, H, n, D)``, wherever their layer is."""
    index = index.to(x.device)
    if len(x) == 1:
        return x.index_select(2, index[0])
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _each_layer(cache: Cache, change: Callable[[Tensor], Tensor]) -> None:
    for layer in cache.layers:
        if layer.is_initialized:
            layer.keys, layer.values = change(layer.keys), change(layer.values)
