"""ToMe: bipartite soft matching, the common baseline of all merging."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.reducers.base import Reducer
from quickmerge.tokens.budget import fixed_count
from quickmerge.tokens.grouping import bipartite_matching, bipartite_pairs
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class ToMe(Reducer):
    """Token Merging (arXiv 2210.09461): merge the most similar alternate tokens until the budget is met.

    Each round splits the free tokens alternately into two sets, joins every token of the first to its most similar
    one in the second (cosine, of the last probed layer's keys averaged over heads, as in the paper) and merges the
    closest pairs, weighted by size. A round halves the free tokens at most, so small budgets take several rounds.
    A slot stands where its second-set token stood, and attention above the merge adds log(size).
    """

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "arXiv 2210.09461"
    proportional: ClassVar[bool] = True

    @property
    def probes(self) -> int:  # noqa: D102
        return 1

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        if not view.attention:
            raise ValueError("attention must hold the trace of the layer below for tome, got none")
        key = view.attention[-1].key
        metric = key.to(torch.promote_types(key.dtype, torch.float32)).mean(1)
        target = fixed_count(self.budget, view)
        if target is not None:
            return self._plan_fixed(view, metric, target)
        count = self.budget.count(view, None)
        total, now = MergePlan.identity(view), view
        while True:
            excess = (now.valid.sum(-1) - count).clamp_min(0)
            if not bool(excess.any()):
                return total
            leader = bipartite_matching(metric, now.free, excess)
            if bool((leader < 0).all()):
                return total
            gone = leader >= 0
            step = MergePlan.from_anchors(now, now.valid & ~gone, leader, now.size.float())
            metric = step.merge(metric)
            now = replace(
                now,
                hidden=step.merge(now.hidden),
                valid=step.valid,
                protected=step.carry(now.protected),
                position=step.position,
                size=step.size,
                attention=(),
            )
            total = total.compose(step)

    def _plan_fixed(self, view: TokenView, metric: Tensor, target: int) -> MergePlan:
        """The same down to ``target`` tokens in every row, by shapes alone; the sets alternate over all positions."""
        total, now, prefix = MergePlan.identity(view), view, view.prefix or 0
        while True:
            n = metric.shape[1]
            remove = min(n - target, (n - prefix) // 2)
            if remove <= 0:
                return total
            source, into, _ = bipartite_pairs(metric, prefix, remove)
            step = MergePlan.from_moves(now, source, into, now.size)
            if n - remove <= max(target, prefix + 1):
                return step if n == view.hidden.shape[1] else total.compose(step)
            metric = step.merge(metric)
            now = replace(
                now, hidden=step.merge(now.hidden), position=step.position, size=step.size, attention=(),
                valid=None, protected=None,
            )  # fmt: skip
            total = total.compose(step)
