"""Random: the floor that every method must clear."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
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
        if view.prefix is not None and view.grid is not None:
            # How many positions there are is known, so that nothing has to be looked up.
            position, length = view.position, view.prefix + math.prod(view.grid)
        else:
            position = torch.where(view.valid, view.position, 0)
            length = int(position.max()) + 1
        table: Tensor = draw(self.seed, length)
        return table.to(view.hidden.device)[position]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def draw(seed: int, length: int) -> Tensor:
    """The first ``length`` numbers in [0, 1) that ``seed`` gives; the same ones however many are asked for.

    They are those of ``torch.rand`` with a generator of this seed, made without torch: an exporter would write down
    that numbers are drawn, and not which.
    """
    bits = np.random.RandomState(seed % 2**32).randint(0, 2**32, length, np.uint32)
    return torch.tensor((bits % 2**24 / 2**24).tolist())
