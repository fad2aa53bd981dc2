"""SCOPE: keep visual tokens that are looked at and that together cover the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import number_at_least
from quickmerge.merge.reducers.base import Needs, Reducer, key_bias, voters
from quickmerge.merge.tokens.budget import fixed_count, known_count
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.saliency import bidirectional_attention
from quickmerge.merge.tokens.selection import cover, keep_only, keeps_everything, most_chosen
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class SCOPE(Reducer):
    """Saliency-coverage pruning (arXiv 2510.24214): greedily keep the salient tokens that cover the others best.

    ``S_ij`` is the cosine of two tokens, floored at 0, and ``c_i`` the largest one of token i with those kept so far.
    Each step keeps the token j of the largest ``a_j^alpha sum_i max(0, S_ij - c_i)``
    (`quickmerge.merge.tokens.selection.cover`). What is kept stays in its order and what is not is dropped.

    The saliency a is the view's own where it has one: a host that prunes behind a vision tower measures the attention
    of the class token there. Otherwise it is the attention that the prefix tokens (class token, registers) pay to each
    token, mean over heads; where there is no prefix, that of all tokens, for encoders without a class token. The paper
    prunes once, with features and attention of the last layer but one, behind the encoder.

    Protected tokens are kept, count in the budget, and neither cover nor want to be covered. Every row has a budget of
    its own, and more than there is asks for all.

    Args:
        keep: share of the tokens kept, or a budget.
        alpha: how much saliency counts, of at least 0; at 0 it is not read and coverage alone decides.
    """

    alpha: float = 1.0
    name: ClassVar[str] = "scope"
    source: ClassVar[str] = "arXiv 2510.24214"
    places: ClassVar[tuple[str, ...]] = ("vision",)
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number_at_least("alpha", self.alpha, 0)

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(1, 1, frozenset({"tower", "attention"})) if self.alpha else Needs(visual=frozenset({"tower"}))

    @torch.no_grad()
    def saliency(self, view: TokenView) -> Tensor | None:
        """``(B, N)``, non-negative, zero for padding; None if nobody needs one and the view has none.

        Raises:
            ValueError: if there is neither a saliency nor a trace to read.
        """
        if view.evidence.saliency is not None:
            return torch.where(view.valid, view.evidence.saliency, 0.0)
        if not self.alpha:
            return None
        if not view.evidence.attention:
            raise ValueError(
                f"attention must hold the trace of the view's block for {self.name} where the view has no saliency, "
                f"got none"
            )
        tokens = view.hidden.shape[1]
        if view.prefix is not None:
            rows = voters(view, 0 if view.prefix else tokens)
        else:
            rows = voters(view, torch.where((view.protected & view.valid).any(-1), 0, tokens))
        received = bidirectional_attention(view.evidence.attention[-1], rows, key_bias(view, self.proportional)).mean(1)
        return torch.where(view.valid, received, 0.0)

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        saliency, left = self.saliency(view), fixed_count(self.budget, view)
        if left is not None and view.prefix is not None:
            p = view.prefix
            behind = None if saliency is None else saliency[:, p:]
            return keep_only(view, cover(view.hidden[:, p:], left - p, behind, self.alpha), left)
        count, kept = self.budget.count(view, saliency), known_count(self.budget, view)
        if keeps_everything(view, count, kept):
            return MergePlan.identity(view)
        wanted = count - (view.protected & view.valid).sum(-1)
        # Values are looked up anyway; on an accelerator each look would wait for it.
        lazy = view.hidden.device.type == "cpu"
        most = most_chosen(view, kept)
        return keep_only(view, cover(view.hidden, wanted, saliency, self.alpha, view.free, lazy, most), kept=kept)
