"""What a chooser of cache entries sees of one layer: its queries, keys and values, exactly as the model used them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from quickmerge.models.rotary import Rotary

ROWS = 128
"""Query rows scored at once: their scores of all heads stay in cache."""


@dataclass(frozen=True)
class CacheView:
    """One layer of a prompt that has just been read.

    Args:
        query: ``(B, H, q, d)`` after rotary embedding, of the last q entries: all of them, when a prompt was read.
        key: ``(B, G, n, d)`` after rotary embedding; ``H / G`` query heads share a key head.
        value: ``(B, G, n, e)``.
        valid: ``(B, n)`` bool, False for padding; the valid entries of a row are contiguous.
        position: ``(B, n)``, the place of each entry in the given text, rising over the valid ones.
        scaling: the factor on the scores.
        window: the layer's sliding window in positions, or None.
        bias: ``(B, n)``, what the model adds to the scores of each key, such as log(size) of slots; None for nothing.
        rotary: the layer's rotation, made when it is asked for.
        group: ``(B, n)`` long, the span of the text that each entry is of, where the method asked and the host knows;
            neighbours with the same number are of one span.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    valid: Tensor
    position: Tensor
    scaling: float
    window: int | None = None
    bias: Tensor | None = None
    rotary: Callable[[], Rotary] | None = None
    group: Tensor | None = None

    @property
    def groups(self) -> int:
        """G, heads that have keys of their own."""
        return self.key.shape[1]

    @property
    def rank(self) -> Tensor:
        """``(B, n)`` long: how many valid entries a row has up to each, 1 for the first."""
        return self.valid.long().cumsum(-1)

    def probabilities(self, rows: range) -> tuple[Tensor, Tensor]:
        """Attention of some entries to all up to the last of them, exact.

        Args:
            rows: entries that have a query.

        Returns:
            ``(B, G, H/G, q, m)`` in float32, or float64 if the queries are, with ``m = rows[-1] + 1``; zero in rows of
            padding. And ``(B, q, m)`` bool, which entries each row sees.
        """
        b, h, _, d = self.query.shape
        g, q, m = self.groups, len(rows), rows[-1] + 1
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        first = self.key.shape[2] - self.query.shape[2]
        query = self.query[:, :, rows.start - first : rows.stop - first : rows.step].to(dtype) * self.scaling
        # Products are taken in the model's own precision, as its attention takes them, and the softmax in float32.
        query = query.to(self.query.dtype).reshape(b, g, (h // g) * q, d)
        scores = (query @ self.key[:, :, :m].transpose(-1, -2)).to(dtype).view(b, g, h // g, q, m)
        if self.bias is not None:
            scores = scores + self.bias[:, None, None, None, :m].to(dtype)
        sees = self._sees(rows)
        if self._plain:
            # All see what stands in front of the first of them, so that less has to be hidden.
            front = rows.start
            scores[..., front:].masked_fill_(~sees[:, None, None, :, front:], -torch.inf)
            return scores.softmax(-1), sees
        scores = scores.masked_fill_(~sees[:, None, None], -torch.inf)
        # A row of padding sees nothing, and its softmax is no number.
        return scores.softmax(-1).masked_fill_(~sees.any(-1)[:, None, None, :, None], 0.0), sees

    @cached_property
    def _plain(self) -> bool:
        """Whether nothing is hidden but what is yet to come."""
        return self.window is None and bool(self.valid.all())

    def _sees(self, rows: range) -> Tensor:
        here = slice(rows.start, rows.stop, rows.step)
        place = torch.arange(rows[-1] + 1, device=self.valid.device)
        sees = (place <= place[here, None]) & self.valid[:, None, : len(place)] & self.valid[:, here, None]
        if self.window is not None:
            distance = self.position[:, here, None] - self.position[:, None, : len(place)]
            sees = sees & (distance < self.window)
        return sees

    def of_rows(self, rows: Tensor) -> CacheView:
        """The view of some rows of the batch, by their numbers."""
        query, key, value, valid, position = (
            x.index_select(0, rows) for x in (self.query, self.key, self.value, self.valid, self.position)
        )
        bias = None if self.bias is None else self.bias.index_select(0, rows)
        group = None if self.group is None else self.group.index_select(0, rows)
        return replace(self, query=query, key=key, value=value, valid=valid, position=position, bias=bias, group=group)

    def blocks(self, every: int = 1, end: int | None = None) -> list[range]:
        """The query rows, or every so-manieth of them up to the last in front of ``end``, in parts.

        A part is a few rows; ``end`` is that of the entries for None.
        """
        n = self.key.shape[2] if end is None else end
        start = self.key.shape[2] - self.query.shape[2]
        rows = range(start + (n - 1 - start) % every, n, every)
        return [rows[a : a + ROWS] for a in range(0, len(rows), ROWS)]
