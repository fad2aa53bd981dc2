"""GemFilter: what the last token looks at in a middle block is all that the model reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.merge.reducers.base import Needs, mean_attention
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.tokens.saliency import AttentionTrace, last_rows, pool, received_attention
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class GemFilter(Reread):
    """Keep the tokens that the last token's queries meet in a middle block, and read the prompt again without the rest.

    Of block r, the scout's last one, ``score_j = sum_h <q_hn, k_hj>`` with n the last token, a mean over neighbours
    then taken (Algorithm 1 of the paper): products of queries and keys, without a softmax. The tokens that are kept are
    read again from the first block, side by side.

    Args:
        keep: share of the tokens kept, or a budget.
        block: r; None is 13/32 of the way up, the 13th of the paper's 32.
        window: the last tokens whose queries count; the paper's is one.
        pool: width of the mean over neighbours, odd.
        softmax: sum attention, in place of products of queries and keys.
    """

    window: int = 1
    pool: int = 5
    softmax: bool = False
    name: ClassVar[str] = "gemfilter"
    source: ClassVar[str] = "arXiv 2409.17422"
    positions: ClassVar[str] = "consecutive"
    depth: ClassVar[float] = 13 / 32

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("window", "pool"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number, got {self.pool!r}")
        if not isinstance(self.softmax, bool):
            raise ValueError(f"softmax must be True or False, got {self.softmax!r}")

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(1, self.window)

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        found = mean_attention(view, self._attention if self.softmax else self._products)
        return pool(found, view.valid, self.pool)

    def _attention(self, trace: AttentionTrace, valid: Tensor, position: Tensor) -> Tensor:
        return received_attention(trace, valid, position, self.window)

    def _products(self, trace: AttentionTrace, valid: Tensor, position: Tensor) -> Tensor:
        """``(B, H, N)``: mean over the last queries of their products with every key, wherever a window ends."""
        rows, real = last_rows(valid, self.window)
        b, h, _, d = trace.query.shape
        dtype = torch.promote_types(trace.query.dtype, torch.float32)
        picked = trace.query.gather(2, rows[:, None, :, None].expand(b, h, -1, d)).to(dtype)
        # The mean of products is the product of the mean: the queries of one that is not there count nothing.
        query = torch.where(real[:, None, :, None], picked, 0).sum(2) / real.sum(-1)[:, None, None]
        key = trace.key.to(dtype)
        products = torch.einsum("bgrd,bgnd->bgrn", query.view(b, key.shape[1], -1, d), key).flatten(1, 2)
        return torch.where(valid[:, None], products * trace.scaling, 0.0)
