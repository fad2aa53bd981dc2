"""ToMe: bipartite soft matching, the common baseline of all merging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from quickmerge.reducers.base import Reducer
from quickmerge.reducers.matching import match_down, mean_key
from quickmerge.tokens.budget import fixed_count
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

    @property
    def asks(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"key"})

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        metric, count = mean_key(view, self.name), fixed_count(self.budget, view)
        return match_down(view, metric, self.budget.count(view, None) if count is None else count)
