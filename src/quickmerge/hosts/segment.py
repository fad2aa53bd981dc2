"""A segment: the blocks between one merge and the next, with the slots they see and how they may attend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.hosts.attention import decoder_mask
from quickmerge.hosts.structure import Decoder
from quickmerge.tokens.plan import MergePlan

FAR = 2**62
"""A position before and behind all others."""


@dataclass(frozen=True)
class Segment:
    """What the blocks above one merge read: slots first, then whatever came after the prompt.

    ``slots`` is K, the entries that stand for the prompt. ``position (B, K + t)``, ``valid (B, K + t)`` and ``size (B,
    K + t)`` are tables over the entries of these blocks' cache. A segment is never changed: what comes after the prompt
    makes a new one, so that a forward keeps its own.
    """

    slots: int
    position: Tensor
    valid: Tensor
    size: Tensor
    padded: bool

    @classmethod
    def of(cls, plan: MergePlan) -> Segment:
        """The segment that a merge starts."""
        return cls(plan.slots, plan.position, plan.valid, plan.size, padded=not bool(plan.valid.all()))

    def extended(self, position: Tensor, valid: Tensor, stored: int | None = None) -> Segment:
        """With ``t`` new tokens ``(B, t)`` after the first ``stored`` entries, all of them for None.

        They are fewer than there were if a cache was cropped.
        """
        kept = slice(None, stored)
        return replace(
            self,
            position=torch.cat([self.position[:, kept], position], 1),
            valid=torch.cat([self.valid[:, kept], valid], 1),
            size=torch.cat([self.size[:, kept], torch.ones_like(position)], 1),
            padded=self.padded or not bool(valid.all()),
        )

    def each_row(self, change: Callable[[Tensor], Tensor]) -> Segment:
        """The segment of a cache whose rows were picked, moved or repeated by ``change``."""
        return replace(self, position=change(self.position), valid=change(self.valid), size=change(self.size))

    def mask(self, decoder: Decoder, layer: int, hidden: Tensor, cache: Cache | None) -> Any:
        """The attention mask of a block for ``hidden (B, q, D)``, built by the model's own mask builder.

        Plain causal order over the cache's entries; a sliding window is measured in original positions, since
        entries are fewer than positions above a merge.
        """
        window, q = decoder.windows[layer], hidden.shape[1]
        past = cache.get_seq_length(layer) if cache is not None else 0
        kv, offset = cache.get_mask_sizes(q, layer) if cache is not None else (q, 0)
        function, exotic = None, False
        if window is not None:
            place = self.position
            span = torch.where(self.valid, place, place.amax()).amin()
            exotic = int(place.max() - span) >= window
            if exotic:

                def function(b: Any, h: Any, i: Any, j: Any) -> Any:
                    return (j <= i) & (place[b, i] - place[b, j] < window)

        return decoder_mask(
            decoder,
            rows=len(hidden),
            queries=q,
            keys=kv,
            query_offset=past,
            key_offset=offset,
            sees=function,
            valid=self.valid if self.padded else None,
            skip=not exotic,
            dtype=hidden.dtype,
            device=hidden.device,
        )


def columns_at(position: Tensor, valid: Tensor, wanted: Tensor) -> Tensor:
    """``(B, K)`` long: the column at which each position ``wanted (B, K)`` stands; any column for one that is nowhere.

    Args:
        position: ``(B, N)``, rising over the valid tokens of a row, which stand side by side.
        valid: ``(B, N)`` bool.
        wanted: ``(B, K)``.
    """
    behind = valid.long().cumsum(-1) > 0
    place = torch.where(valid, position, torch.where(behind, FAR, -FAR))
    return torch.searchsorted(place.contiguous(), wanted.contiguous()).clamp_max(position.shape[1] - 1)


def pick_columns(x: Tensor, source: Tensor, axis: int = -1) -> Tensor:
    """The columns ``source (B, K)`` of ``x``: columns lie along ``axis``, the rows, B or 1, along the axis before.

    ``(..., N, d)`` with axis -2, as rotary tables are, or ``(..., N)`` with axis -1, as positions are.
    """
    rows = axis - 1
    x = x.expand(*x.shape[:rows], len(source), *x.shape[rows + 1 :])
    index = source if axis == -1 else source[..., None].expand(-1, -1, x.shape[-1])
    return x.gather(axis, index.expand(*x.shape[: x.ndim + rows], *index.shape))
