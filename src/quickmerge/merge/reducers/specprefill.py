"""SpecPrefill with the model's own lower blocks as the scout: chunks that the last tokens look at are read again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.merge.reducers.base import Needs, mean_attention
from quickmerge.merge.reducers.reread import Reread
from quickmerge.merge.tokens.saliency import pool, received_attention
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class SpecPrefill(Reread):
    """Keep the chunks of a prompt that its last tokens look at in the lower blocks, and read these again in place.

    The paper asks a smaller model; here the lower blocks of the model itself are asked, which need no other weights.
    Attention is averaged over heads, layers and voters, then over neighbours; a chunk counts as the mean of its tokens.
    Chunks are kept whole, the best first, but for the last one that the budget pays for; each token keeps its position.

    Args:
        keep: share of the tokens kept, or a budget.
        block: the last block that is asked; None is the one in the middle of the model.
        layers: how many blocks are asked, up to that one.
        window: the last tokens, whose attention counts.
        pool: width of the mean over neighbours, odd.
        chunk: tokens of a chunk, counted from the start of a prompt.
    """

    layers: int = 4
    window: int = 16
    pool: int = 13
    chunk: int = 32
    name: ClassVar[str] = "specprefill"
    source: ClassVar[str] = "arXiv 2502.02789"
    positions: ClassVar[str] = "kept"
    depth: ClassVar[float] = 1 / 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "window", "pool", "chunk"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be an odd number, got {self.pool!r}")

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(self.layers, self.window)

    def score(self, view: TokenView) -> Tensor:
        """``(B, N)``: of each token the mean of its chunk."""
        found = pool(mean_attention(view, partial(received_attention, window=self.window)), view.valid, self.pool)
        valid = view.valid
        place = torch.where(valid, (valid.long().cumsum(-1) - 1) // self.chunk, 0)
        width = int(place.max()) + 1
        total = found.new_zeros(len(valid), width).scatter_add(1, place, torch.where(valid, found, 0.0))
        count = found.new_zeros(len(valid), width).scatter_add(1, place, valid.to(found.dtype))
        return torch.where(valid, (total / count.clamp_min(1)).gather(1, place), 0.0)
