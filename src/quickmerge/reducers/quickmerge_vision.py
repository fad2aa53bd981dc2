"""QuickMerge++ inside a vision transformer: what little is read, and what is alike, merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import number_at_least, whole_number
from quickmerge.reducers.base import Reducer
from quickmerge.reducers.matching import match_down, mean_key
from quickmerge.reducers.mlerp import OPERATORS, mlerp
from quickmerge.reducers.vision import key_bias, voters
from quickmerge.tokens.budget import fixed_count
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.saliency import bidirectional_attention, times_value_norm
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class QuickMergeVision(Reducer):
    """QuickMerge++ (arXiv 2508.13204) for the blocks of a vision transformer, training-free.

    Saliency is the attention norm, the root mean square length of what each token adds to the outputs of the voters,
    averaged over heads: ``s_j = mean_h sqrt(mean_i ||p_hij v_hj||^2)``. Voters are the prefix tokens and ``votes``
    patches, evenly spaced. Tokens are matched as in ToMe, each of the one half with its most similar one (cosine of
    the keys, averaged over heads) of the other half, and those merge first, weighted by size, that cost least:

        ``c_i = s_i^alpha (1 - cos(m_i, m_partner))``

    So tokens stay that are read much and resemble no other. A slot is the mean of its members by size, scaled to the
    norm of the longest (`quickmerge.reducers.mlerp`), since a mean is shorter than what went into it. The paper
    publishes no rule for what merges with what; this is ours. Where more than half must go, several rounds follow one
    another, in which a slot has the sum of its members' saliency. Attention above the merge adds log(size).

    Args:
        keep: share of the tokens kept, or a budget such as `Entropy`, which may keep more of one image than of another.
        alpha: how much saliency counts, of at least 0; at 0 similarity alone decides, as in ToMe.
        votes: how many patches vote beside the prefix.
        operator: ``"mlerp"``, or ``"average"`` for the mean as it is.
    """

    alpha: float = 0.25
    votes: int = 32
    operator: str = "mlerp"
    name: ClassVar[str] = "quickmerge"
    source: ClassVar[str] = "arXiv 2508.13204"
    proportional: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("vision",)

    def __post_init__(self) -> None:
        super().__post_init__()
        number_at_least("alpha", self.alpha, 0)
        object.__setattr__(self, "votes", whole_number("votes", self.votes))
        if self.operator not in OPERATORS:
            raise ValueError(f"operator must be one of {', '.join(OPERATORS)}, got {self.operator!r}")

    @property
    def probes(self) -> int:  # noqa: D102
        return 1

    @property
    def asks(self) -> frozenset[str]:  # noqa: D102
        return frozenset({"key", "norm"})

    def voters(self, tokens: float) -> float:  # noqa: D102
        return min(float(self.votes + 1), tokens)

    @torch.no_grad()
    def saliency(self, view: TokenView) -> Tensor:
        """``(B, N)`` attention norm, zero for padding; the view's own saliency where it has one.

        Raises:
            ValueError: if there is no trace to read.
        """
        if view.saliency is not None:
            return torch.where(view.valid, view.saliency, 0.0)
        if not view.attention:
            raise ValueError(f"attention must hold the trace of the view's block for {self.name}, got none")
        trace = view.attention[-1]
        received = bidirectional_attention(trace, voters(view, self.votes), key_bias(view, True), moment=2)
        added = times_value_norm(received, trace.value)
        return torch.where(view.valid, added.mean(1), 0.0)

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        metric, count = mean_key(view, self.name), fixed_count(self.budget, view)
        if self.alpha == 0 and count is not None:
            return match_down(view, metric, count)
        saliency = self.saliency(view)
        left = self.budget.count(view, saliency) if count is None else count
        if self.alpha == 0:
            return match_down(view, metric, left)
        # On a scale of its own, so that no power of it vanishes.
        relative = saliency / saliency.amax(-1, keepdim=True).clamp_min(torch.finfo(saliency.dtype).tiny)
        return match_down(view, metric, left, saliency=relative, power=self.alpha)

    def combine(self, view: TokenView, plan: MergePlan, x: Tensor) -> Tensor:
        """The mean of each slot's members by size, scaled to the norm of the longest; one member is a copy."""
        return plan.merge(x) if self.operator == "average" else mlerp(plan, x)
