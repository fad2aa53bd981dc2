"""Keys that are read one by one: sink and buffer of every row, and softmaxes over parts of the keys put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quickmerge.attention.selection import mix, products, rows_at, weigh

__all__ = ["Part", "Piece", "around", "between", "exact", "finish", "merge", "piece"]


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


def exact(query: Tensor, pieces: Sequence[Piece]) -> Part:
    """The softmax of ``query (B, H, q, g, D)``, scaled, over all pieces."""
    logits = []
    for each in pieces:
        z = products(query, each.key)
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
) -> Piece:
    """Columns ``begin..end - 1`` of every row, without a copy.

    Args:
        keys, values: ``(B, H, n, D)``, of which the last ``new`` columns see each other only backwards.
        size: ``(B, n)``.
        new: q.
        dtype: of the logits.
        begin, end: columns.
        first: ``(B,)`` columns before which there is nothing in a row. Default: 0.
    """
    here = slice(begin, end)
    column = torch.arange(begin, min(end, keys.shape[2]), device=keys.device)[None]
    own = None if size is None else size[:, None, None, None, here]
    hidden = _hidden(column, keys.shape[2], new, first)
    return piece(keys[:, :, here], values[:, :, here], own, hidden, dtype)


def around(
    keys: Tensor,
    values: Tensor,
    size: Tensor | None,
    new: int,
    dtype: torch.dtype,
    bounds: Sequence[tuple[int, int, int]],
) -> list[Piece]:
    """Sink and buffer: what lies before and behind the clustered columns of each row.

    Rows that are alike are read where they lie; of others the columns are fetched, so that a row is not read from where
    a longer one begins.

    Args:
        keys, values, size, new, dtype: see `between`.
        bounds: for each row, first column of the sink, of the clusters, and of the buffer.
    """
    n = keys.shape[2]
    if all(row == bounds[0] for row in bounds):
        first, start, end = bounds[0]
        spans = [(a, b) for a, b in ((first, min(start, n)), (end, n)) if a < b]
        return [between(keys, values, size, new, dtype, a, b, None) for a, b in spans]
    place = torch.arange(max(start - first + max(0, n - end) for first, start, end in bounds), device=keys.device)
    begin, middle, last = (torch.tensor(x, device=keys.device)[:, None] for x in zip(*bounds, strict=True))
    column = torch.where(place < middle - begin, begin + place, last + place - (middle - begin))
    at = column.clamp_max(n - 1)
    fetch = at[:, None].expand(-1, keys.shape[1], -1)
    own = None if size is None else size.gather(1, at)[:, None, None, None]
    return [piece(rows_at(keys, fetch), rows_at(values, fetch), own, _hidden(column, n, new), dtype)]


def _hidden(column: Tensor, columns: int, new: int, first: Tensor | None = None) -> Tensor | None:
    """Which ``column (B or 1, w)`` each of the ``new`` last ones does not see: ``(B or 1, 1, new, 1, w)``."""
    own = torch.arange(columns - new, columns, device=column.device)
    hidden = column[:, None] > own[None, :, None]
    if first is not None:
        hidden = hidden | (column[:, None] < first[:, None, None])
    return hidden[:, None, :, None]
