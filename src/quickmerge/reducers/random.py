"""Random: the floor that every method must clear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.reducers.base import ScoreReducer
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class Random(ScoreReducer):
    """Keep a random subset of the tokens and drop the rest.

    Args:
        keep: share of the tokens kept, or a budget.
        seed: the draw depends on it and on a token's position alone, so batch mates and padding change nothing.
    """

    seed: int = 0
    name: ClassVar[str] = "random"

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        generator = torch.Generator().manual_seed(self.seed)
        position = torch.where(view.valid, view.position, 0)
        table = torch.rand(int(position.max()) + 1, generator=generator).to(view.hidden.device)
        return table[position]
