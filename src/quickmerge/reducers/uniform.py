"""Uniform: keep tokens at an even stride."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from quickmerge.reducers.base import Reducer
from quickmerge.tokens.budget import fixed_count
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView


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
        return MergePlan.from_anchors(view, fixed | (view.free & torch.gt(step, before)))
