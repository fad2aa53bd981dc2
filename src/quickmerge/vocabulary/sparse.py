"""Vectors as weighted sums of few others."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Sparse", "combine"]


@dataclass(frozen=True)
class Sparse:
    """Each of T targets as a sum of at most k atoms.

    Attributes:
        indices: ``(T, k)`` long, the atoms in the order in which they were chosen; -1: unused, always last.
        weights: ``(T, k)``, zero where unused.
    """

    indices: Tensor
    weights: Tensor

    @property
    def count(self) -> Tensor:
        """``(T,)`` long, how many atoms each target uses."""
        return (self.indices >= 0).sum(1)

    @property
    def total(self) -> Tensor:
        """``(T,)``, the sum of each target's weights."""
        return self.weights.sum(1)


def combine(sparse: Sparse, rows: Tensor) -> Tensor:
    """``(T, d)``: the weighted sums of ``rows (N, d)``."""
    out = rows.new_zeros(len(sparse.indices), rows.shape[1])
    for index, weight in zip(sparse.indices.T, sparse.weights.T.to(rows.dtype), strict=True):
        out.addcmul_(rows[index.clamp_min(0)], weight[:, None])
    return out
