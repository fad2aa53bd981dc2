"""Keys and values of the serial head: rows of any length side by side, without holes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RowCache"]

GROWTH = 256
"""Columns that are added at least when there is no more room."""


class RowCache:
    """What the serial head has read of each row, and behind it what it drafts at the moment.

    Row b holds its pairs in the columns 0 .. length[b] - 1. Columns behind them are scratch: whatever is written there
    is overwritten when the row grows. So rows that accept different numbers of tokens never leave holes, and a draft
    needs no undoing.

    It is given to transformers' decoder layers in the place of their own cache, of which they only call `update`.
    """

    def __init__(self, rows: int) -> None:
        self.length = [0] * rows
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []
        self._at = torch.zeros(rows, 0, dtype=torch.long)
        self._width = 0
        self._first: int | None = None

    def aim(self, at: Tensor, width: int, first: int | None = None) -> None:
        """Say where the next pairs go, and how far the layers shall see.

        Args:
            at: ``(B, K)`` long, the column of each pair.
            width: how many columns the layers are given; all of ``at`` lie in them.
            first: the first of the columns, where all rows have the same K columns in a row.
        """
        self._at, self._width, self._first = at, width, first

    def update(self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take keys and values ``(B, heads, K, d)`` of a layer in; returns all that it holds, in `aim`'s width."""
        if layer == len(self._keys):
            self._keys.append(key[:, :, :0])
            self._values.append(value[:, :, :0])
        for held, new in ((self._keys, key), (self._values, value)):
            held[layer] = self._with_room(held[layer])
            if self._first is not None:
                held[layer][:, :, self._first : self._first + new.shape[2]] = new
            else:
                rows = torch.arange(len(new), device=new.device)[:, None]
                held[layer][rows, :, self._at] = new.transpose(1, 2)
        return self._keys[layer][:, :, : self._width], self._values[layer][:, :, : self._width]

    def _with_room(self, x: Tensor) -> Tensor:
        if x.shape[2] >= self._width:
            return x
        size = max(self._width, x.shape[2] + max(GROWTH, x.shape[2] // 2))
        # Zeros, not whatever was in memory: a hidden column counts nothing times its value, which must be a number.
        wider = x.new_zeros(x.shape[0], x.shape[1], size, x.shape[3])
        wider[:, :, : x.shape[2]] = x
        return wider

    def rows(self, index: Tensor) -> None:
        """Go on with the rows ``index (R,)`` alone, in this order."""
        self._keys, self._values = [x[index] for x in self._keys], [x[index] for x in self._values]
        self.length = [self.length[row] for row in index.tolist()]
