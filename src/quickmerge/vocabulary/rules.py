"""Rules that rebuild a base row for a token that only the donor has: one interface for all that look at donor vectors.

A rule sees the new tokens in the donor's space, ``targets (T, dd)``, and the shared tokens in both spaces, row by row:
``anchors (N, dd)`` in the donor's, ``rows (N, db)`` in the base's. Input and output matrices are rebuilt apart, each
with its own vectors.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.vocabulary.linear import LeastSquares, Procrustes
from quickmerge.vocabulary.nearest import Nearest
from quickmerge.vocabulary.omp import SELECTIONS, omp
from quickmerge.vocabulary.spaces import aligned, at_least_float32, without_vector
from quickmerge.vocabulary.sparse import Sparse, combine

__all__ = ["LeastSquares", "Mean", "Nearest", "Omp", "Procrustes", "Rule", "SparseRule", "Zero"]


class Rule(Protocol):
    """How to rebuild base rows from donor vectors."""

    @property
    def name(self) -> str:
        """What tables call it: short, different for different settings."""
        ...

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """``(T, db)`` base rows, in float32 at least, for ``targets (T, dd)``."""
        ...


@runtime_checkable
class SparseRule(Protocol):
    """A rule whose rows are weighted sums of few shared rows."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        ...

    def coefficients(self, targets: Tensor, anchors: Tensor) -> Sparse:
        """Which shared tokens, and how much of each: from the donor's space alone."""
        ...

    def combine(self, sparse: Sparse, rows: Tensor) -> Tensor:
        """``(T, db)`` rows from such coefficients and ``rows (N, db)``."""
        ...


@dataclass(frozen=True)
class Omp:
    """Orthogonal matching pursuit in the donor's space, the same weights in the base's (arXiv 2506.06607).

        t ~ m_d + sum_i w_i (a_i - m_d)        row = m_b + sum_i w_i (b_i - m_b) = sum_i w_i b_i + (1 - sum_i w_i) m_b

    with m the means of the shared tokens. Raw weights don't sum to one, so a row without the second term carries too
    little of what all base rows have in common, and its logit is off by (sum_i w_i - 1) h·m_b at every position.

    Args:
        k: most shared tokens for each new one; with fewer shared ones all of them may be used.
        centre: whether to subtract the mean in the donor's space.
        selection: see `omp`.
        correct_mean: whether to add the second term. ``Omp(k, centre=False, selection="inner", correct_mean=False)``
            is the paper's rule.

    Raises:
        QuickmergeError: for an unknown selection.
        ValueError: for a k that is no whole number of at least 1.
    """

    k: int = 64
    centre: bool = True
    selection: str = "unit"
    correct_mean: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number("k", self.k))
        if self.selection not in SELECTIONS:
            hint = near_match(str(self.selection), SELECTIONS)
            raise QuickmergeError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}{hint}")

    @property
    def name(self) -> str:
        """What tables call it."""
        words = [f"omp k={self.k}", self.selection, "" if self.centre else "uncentred"]
        return " ".join(w for w in [*words, "" if self.correct_mean else "uncorrected"] if w)

    def spaces(self, targets: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and atoms as the pursuit sees them, centred or not; tokens that nobody trained stay zeros."""
        targets, anchors = aligned(targets, anchors)
        lost, idle = without_vector(targets)[:, None], without_vector(anchors)[:, None]
        if self.centre:
            middle = anchors.sum(0) / (~idle).sum().clamp_min(1)
            targets, anchors = targets - middle, anchors - middle
        return targets.masked_fill(lost, 0.0), anchors.masked_fill(idle, 0.0)

    def coefficients(self, targets: Tensor, anchors: Tensor) -> Sparse:
        """As `SparseRule.coefficients`; a target of zeros, which nobody trained, gets none."""
        x, atoms = self.spaces(targets, anchors)
        return omp(x, atoms, min(self.k, len(atoms)), selection=self.selection)

    def combine(self, sparse: Sparse, rows: Tensor) -> Tensor:
        """As `SparseRule.combine`."""
        rows = at_least_float32(rows)
        out = combine(sparse, rows)
        if self.correct_mean:
            out.addcmul_(1 - sparse.total[:, None].to(out.dtype), rows.mean(0))
        return out

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        return self.combine(self.coefficients(targets, anchors), rows)


@dataclass(frozen=True)
class Mean:
    """The mean of the shared rows, for every new token: what any rule has to beat."""

    name: str = "mean"

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        rows = at_least_float32(rows)
        return rows.mean(0).repeat(len(targets), 1)


@dataclass(frozen=True)
class Zero:
    """Zeros, for every new token: leaves its logits at zero, which is no small number where the others' are below."""

    name: str = "zero"

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        rows = at_least_float32(rows)
        return rows.new_zeros(len(targets), rows.shape[1])
