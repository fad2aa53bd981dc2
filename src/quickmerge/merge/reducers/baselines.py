"""TopNorm: keep the tokens whose features are longest."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.merge.reducers.base import Reducer, ScoreReducer
from quickmerge.merge.tokens.budget import fixed_count, known_count
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class TopNorm(ScoreReducer):
    """Keep the tokens with the largest ``||x_i||`` in the residual stream and drop the rest."""

    name: ClassVar[str] = "topnorm"

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        x = view.hidden.to(torch.promote_types(view.hidden.dtype, torch.float32))
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return norm


# Uniform: keep tokens at an even stride.


@dataclass(frozen=True)
class Uniform(Reducer):
    """Keep every so many-th of the free tokens, as evenly as whole numbers allow, and drop the rest."""

    name: ClassVar[str] = "uniform"

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        left = fixed_count(self.budget, view)
        if left is not None and view.prefix is not None:
            b, n = view.hidden.shape[:2]
            # Token i stays where floor(i c / m) steps up, so the t-th that goes, from 0, is floor(t m / (m - c)).
            gone = torch.arange(n - left, device=view.hidden.device) * (n - view.prefix) // max(1, n - left)
            return MergePlan.from_moves(view, (view.prefix + gone).expand(b, -1))
        fixed = view.protected & view.valid
        count = self.budget.count(view, None) - fixed.sum(-1)
        free = view.free.sum(-1)
        # Of m free tokens keep c: token i (counted from 1) where floor(i c / m) steps up. Exactly c steps.
        rank = view.free.long().cumsum(-1)
        step = (rank * count[:, None]).div(free.clamp_min(1)[:, None], rounding_mode="floor")
        before = ((rank - 1) * count[:, None]).div(free.clamp_min(1)[:, None], rounding_mode="floor")
        anchor = fixed | (view.free & torch.gt(step, before))
        return MergePlan.from_anchors(view, anchor, kept=known_count(self.budget, view))


# Truncate: the first tokens (attention sinks) and the most recent ones, StreamingLLM's choice.


@dataclass(frozen=True)
class Truncate(ScoreReducer):
    """Keep the first ``sinks`` tokens and then the most recent ones (arXiv 2309.17453); drop the middle.

    Args:
        keep: share of the tokens kept, or a budget.
        sinks: tokens kept at the start, whatever is protected besides.
    """

    sinks: int = 4
    name: ClassVar[str] = "truncate"
    places: ClassVar[tuple[str, ...]] = ("text",)
    source: ClassVar[str] = "arXiv 2309.17453"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        recency = torch.where(view.valid, view.position, 0).to(torch.float64)
        return torch.where(view.position < self.sinks, 2 * recency.amax(-1, keepdim=True) + 1 - recency, recency)


# Random: the floor that every method must clear.


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
