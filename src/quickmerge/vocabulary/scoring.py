"""How well a rule rebuilds tokens whose base rows are known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.pieces import Subword
from quickmerge.vocabulary.rules import Rule, SparseRule
from quickmerge.vocabulary.spaces import at_least_float32
from quickmerge.vocabulary.sparse import Sparse

__all__ = ["Score", "Split"]

OWN_ROW = 0.1
"""Held-out tokens, as a share, whose single piece may have the same row: some rows of a base were never trained."""


@dataclass(frozen=True)
class Score:
    """How well a rule rebuilds the held-out tokens; means over them.

    Attributes:
        rule: the rule.
        cosine: to the true rows.
        centred_cosine: the same after subtracting the mean of the anchors' rows from both.
        error: ||row - true|| / ||true||.
        offset: (row - true) along the direction of the mean row, as a share of the mean length of a row; its product
            with a hidden state is what all logits of such rows are off by.
        offset_spread: the standard deviation of that.
        donor_residual: what the weighted sum leaves of the donor vector, relative to it; None for a rule without
            weights.
        weight_sum, weight_sum_spread: mean and standard deviation of the sum of a token's weights, or None.
        by_kind: centred cosine for each kind of token.
    """

    rule: Rule | Subword
    cosine: float
    centred_cosine: float
    error: float
    offset: float
    offset_spread: float
    donor_residual: float | None
    weight_sum: float | None
    weight_sum_spread: float | None
    by_kind: Mapping[str, float]


@dataclass
class Split:
    """The held-out tokens and the others.

    Attributes:
        targets, true: ``(T, dd)`` and ``(T, db)``, the held-out ones in the donor's and the base's space.
        anchors, rows: ``(N, dd)`` and ``(N, db)``, the others.
        matrix: ``(V, db)``, all rows of the base, where rules may look at pieces.
        pieces: of each held-out token.
    """

    targets: Tensor
    anchors: Tensor
    rows: Tensor
    true: Tensor
    matrix: Tensor | None
    pieces: list[Sequence[int]] | None

    def refuse_own_rows(self) -> None:
        """Raise QuickmergeError if the pieces of the held-out tokens are those tokens."""
        assert self.pieces is not None and self.matrix is not None
        alone = [i for i, p in enumerate(self.pieces) if len(p) == 1]
        near = at_least_float32(self.matrix)[[self.pieces[i][0] for i in alone]]
        same = int((near == self.true[alone]).all(1).sum()) if alone else 0
        if same > OWN_ROW * len(self.pieces):
            raise QuickmergeError(
                f"pieces must be what a token's text is cut into without the token itself, got the token for {same} of "
                f"{len(self.pieces)} held-out ones"
            )

    def score(self, rule: Rule | Subword, ready: Sparse | None, members: dict[str, Tensor]) -> tuple[Score, Tensor]:
        """The score, and the centred cosine of each token ``(T,)``."""
        sums: Tensor | None = None
        residual: float | None = None
        if isinstance(rule, Subword):
            assert self.pieces is not None and self.matrix is not None
            got = rule.rebuild(self.pieces, self.matrix)
        elif isinstance(rule, SparseRule):
            sparse = rule.coefficients(self.targets, self.anchors) if ready is None else ready
            got, sums = rule.combine(sparse, self.rows), sparse.total
            left = self.targets - rule.combine(sparse, self.anchors)
            residual = float((left.norm(dim=1) / self.targets.norm(dim=1)).mean())
        else:
            got = rule.rebuild(self.targets, self.anchors, self.rows)
        middle = self.rows.mean(0)
        off = got - self.true
        centred = cosine_similarity(got - middle, self.true - middle, dim=1)
        along = off @ middle / middle.norm().clamp_min(torch.finfo(off.dtype).tiny) / self.rows.norm(dim=1).mean()
        score = Score(
            rule=rule,
            cosine=float(cosine_similarity(got, self.true, dim=1).mean()),
            centred_cosine=float(centred.mean()),
            error=float((off.norm(dim=1) / self.true.norm(dim=1)).mean()),
            offset=float(along.mean()),
            offset_spread=float(along.std()),
            donor_residual=residual,
            weight_sum=None if sums is None else float(sums.mean()),
            weight_sum_spread=None if sums is None else float(sums.std()),
            by_kind={kind: float(centred[own].mean()) for kind, own in members.items()},
        )
        return score, centred
