"""ObservedAttention: what a key received from every query that could see it; with a share for the recent, H2O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.merge.cache.evictor import Evictor, Heads
from quickmerge.merge.cache.view import CacheView

AVERAGES = ("mean", "sum")


@dataclass(frozen=True)
class ObservedAttention(Evictor):
    """Keep what was attended to most while the prompt was read.

    ``s_j = sum_i p_ij / n_j`` over all later queries i of which ``n_j`` can see key j, averaged over the query heads of
    a key head. Half of the entries stay for being recent. H2O (arXiv 2306.14048) accumulates instead,
    ``average="sum"``. Fused kernels give no probabilities, so scores are computed a second time, a block of queries at
    a time, and of these only every ``every``-th: with every fourth text goes on as well as with all of them.

    Args:
        average: ``"mean"`` over the queries that can see a key, or ``"sum"``.
        every: of how many queries of a row one is looked at, counted from the last one.
    """

    recency: float = 0.5
    average: str = "mean"
    every: int = 4
    name: ClassVar[str] = "observed"
    source: ClassVar[str] = "arXiv 2306.14048"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "every", whole_number("every", self.every))
        if self.average not in AVERAGES:
            hint = near_match(str(self.average), AVERAGES)
            raise QuickmergeError(f"average must be one of {', '.join(AVERAGES)}, got {self.average!r:.80}{hint}")

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """Queries times keys, of causal order and of every so-manieth query."""
        return sum(n * n for n in tokens) * shape.heads * shape.head_dim / self.every

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        b, g, n = view.key.shape[:3]
        dtype = torch.promote_types(view.query.dtype, torch.float32)
        total = torch.zeros(b, g, n, dtype=dtype, device=view.key.device)
        seen = torch.zeros(b, n, dtype=dtype, device=view.key.device)
        # Counted from the last entry of each row, which in front of padding stands elsewhere.
        behind = (view.valid.flip(-1).long().argmax(-1)) % self.every
        for off in sorted(set(behind.tolist())):
            rows = (behind == off).nonzero().flatten()
            part = view if len(rows) == b else view.of_rows(rows)
            for block in part.blocks(every=self.every, end=n - off):
                probs, sees = part.probabilities(block)
                total[rows, :, : block[-1] + 1] += probs.mean(2).sum(2)
                seen[rows, : block[-1] + 1] += sees.sum(1).to(dtype)
        return total / seen[:, None].clamp_min(1) if self.average == "mean" else total
