"""Methods that ask no query: LagKV and KeyDiff compare keys with keys, StreamingLLM looks at nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quickmerge.errors import whole_number
from quickmerge.merge.cache.evictor import Evictor
from quickmerge.merge.cache.view import CacheView


@dataclass(frozen=True)
class LagKV(Evictor):
    """Keep what is unlike the text that follows it (arXiv 2504.04704).

    Behind the sinks entries are cut into partitions of ``lag``. Each channel of a partition is scaled by the least and
    the largest value that it has in the next one; an entry's score is the standard deviation over its channels, as a
    softmax over the partition, of its key and its value together; channels that don't change in the next partition say
    nothing. Every partition keeps the same share of its own; the last full one, that has nothing to be compared with,
    and what is behind it stay. Of rows of fewer than two partitions the most recent entries stay.

    Args:
        lag: entries of a partition, at least 2.
    """

    lag: int = 128
    name: ClassVar[str] = "lagkv"
    source: ClassVar[str] = "arXiv 2504.04704"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "lag", whole_number("lag", self.lag, 2))

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        dtype = torch.promote_types(view.key.dtype, torch.float32)
        out = torch.zeros(view.key.shape[:3], dtype=dtype, device=view.key.device)
        for row, valid in enumerate(view.valid):
            start = int(valid.long().argmax())
            first, n = start + self.sinks, int(valid.sum()) - self.sinks
            parts = n // self.lag
            out[row, :, first + max(0, parts - 1) * self.lag :] = 1.0
            if parts < 2:
                out[row, :, start : start + n + self.sinks] = torch.arange(n + self.sinks, device=out.device).to(dtype)
                continue
            span = slice(first, first + parts * self.lag)
            score = sum(_unlike(x[row, :, span].to(dtype), parts) for x in (view.key, view.value))
            assert isinstance(score, Tensor)
            # By rank within a partition, so that all partitions keep the same share.
            rank = score.argsort(-1).argsort(-1).to(dtype) / self.lag
            out[row, :, first : first + (parts - 1) * self.lag] = rank.flatten(1)
        return out

    def least(self, valid: Tensor) -> Tensor:
        """The last full partition and what is behind it; nothing of a row that has but one."""
        n = valid.sum(-1) - self.sinks
        return torch.where(n >= 2 * self.lag, self.lag + n % self.lag, 0)


def _unlike(x: Tensor, parts: int) -> Tensor:
    """``(G, P - 1, L)`` of ``x (G, P L, d)``: how each entry differs from the next of P partitions."""
    x = x.view(len(x), parts, -1, x.shape[-1])
    low, high = x[:, 1:].amin(2, keepdim=True), x[:, 1:].amax(2, keepdim=True)
    scaled = torch.where(high > low, (x[:, :-1] - low) / (high - low), 0.0)
    return scaled.std(-1).softmax(-1)


@dataclass(frozen=True)
class KeyDiff(Evictor):
    """Keep keys that resemble the others least (arXiv 2504.15364): ``s_j = -cos(k_j, mean_i k_i / ||k_i||)``."""

    name: ClassVar[str] = "keydiff"
    source: ClassVar[str] = "arXiv 2504.15364"

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        there = view.valid[:, None, :, None]
        key = normalize(view.key.to(torch.promote_types(view.key.dtype, torch.float32)), dim=-1)
        anchor = torch.where(there, key, 0.0).sum(2, keepdim=True) / there.sum(2, keepdim=True)
        return -(key * normalize(anchor, dim=-1)).sum(-1)


@dataclass(frozen=True)
class StreamingLLM(Evictor):
    """Keep the sinks and the most recent entries (arXiv 2309.17453)."""

    recency: float = 1.0
    name: ClassVar[str] = "streaming"
    source: ClassVar[str] = "arXiv 2309.17453"

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        return view.rank.float()[:, None].expand(-1, view.groups, -1)
