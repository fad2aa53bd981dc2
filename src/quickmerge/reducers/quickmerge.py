"""QuickMerge++: keep by attention norm, merge the rest into what is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.reducers.base import Reducer, mean_attention, positive_int
from quickmerge.tokens.budget import Entropy, Mass, Ratio, select
from quickmerge.tokens.grouping import next_anchor
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.saliency import attention_norm, pool
from quickmerge.tokens.view import TokenView

MOST_VOTERS = 320
"""A window given as a share stops here: more votes cost time at long prompts and gained nothing measurable."""


@dataclass(frozen=True)
class QuickMerge(Reducer):
    """QuickMerge++ (arXiv 2508.13204), training-free.

    Saliency is the attention norm, the root mean square length of what each token adds to the outputs of the last
    ``window`` tokens, averaged over probed layers and heads and over a neighbourhood of ``pool`` tokens:
    ``s_j = mean_{|j'-j| <= pool/2} mean_{l,h} sqrt(mean_i ||p_lhij' v_lhj'||^2)``. The highest stay as anchors; each
    other token merges into the next anchor on its right with share ``merge`` against the anchor's 1.

    Args:
        keep: share of the tokens kept, or a budget such as `Entropy`.
        layers: how many blocks below the merge are probed.
        window: the last tokens, whose attention votes: a share of the tokens that are kept (0.75: three quarters as
            many, but at most 320), or a whole number of tokens. Tied to the budget, since the votes of a longer
            window spend all of a small budget on the window itself. Where the budget waits for the saliency, 40 % of
            the row stand for it.
        pool: neighbourhood, in tokens, that a salient token lifts with it; odd.
        merge: share of a merged token against its anchor's 1; 0 drops instead of merging.
    """

    layers: int = 2
    window: float | int = 0.75
    pool: int = 31
    merge: float = 0.1
    name: ClassVar[str] = "quickmerge"
    source: ClassVar[str] = "arXiv 2508.13204"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "pool"):
            positive_int(name, getattr(self, name))
        if not isinstance(self.window, float):
            positive_int("window", self.window)
        elif not 0 < self.window <= 1:
            raise ValueError(f"window must be a share in (0, 1] or a whole number of tokens, got {self.window!r}")
        if self.pool % 2 == 0:
            raise ValueError(f"pool must be odd, got {self.pool}")
        if not (isinstance(self.merge, (int, float)) and 0 <= self.merge <= 1):
            raise ValueError(f"merge must be a number in [0, 1], got {self.merge!r}")

    @property
    def probes(self) -> int:  # noqa: D102
        return self.layers

    def saliency(self, view: TokenView) -> Tensor:
        """``(B, N)`` pooled attention norm."""
        return pool(mean_attention(view, self._window(view), attention_norm), view.valid, self.pool)

    def _window(self, view: TokenView) -> int | Tensor:
        if not isinstance(self.window, float):
            return self.window
        budget = Ratio(0.4) if isinstance(self.budget, (Entropy, Mass)) else self.budget
        return (budget.count(view, None) * self.window).ceil().long().clamp_max(MOST_VOTERS)

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        saliency = self.saliency(view)
        anchor = select(saliency, self.budget.count(view, saliency), view)
        if self.merge == 0:
            return MergePlan.from_anchors(view, anchor)
        share = torch.where(anchor, 1.0, float(self.merge))
        return MergePlan.from_anchors(view, anchor, next_anchor(view, anchor), share)
