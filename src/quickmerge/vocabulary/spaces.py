"""What all rules ask of the vectors that they are given."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError

__all__ = ["aligned", "at_least_float32", "without_vector"]


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they were."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def aligned(targets: Tensor, anchors: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Targets and anchors in one precision, float32 at least.

    Args:
        targets: ``(T, dd)``.
        anchors: ``(N, dd)``, N at least 1.
        rows: ``(N, db)``.

    Raises:
        QuickmergeError: if the shapes don't fit.
    """
    if targets.ndim != 2 or anchors.ndim != 2 or targets.shape[1] != anchors.shape[1]:
        shapes = f"{tuple(targets.shape)} and {tuple(anchors.shape)}"
        raise QuickmergeError(f"targets and anchors must be (T, d) and (N, d) with the same d, got {shapes}")
    if not len(anchors):
        raise QuickmergeError("anchors must hold at least one shared token, got none")
    if rows is not None and (rows.ndim != 2 or len(rows) != len(anchors)):
        raise QuickmergeError(f"rows must be ({len(anchors)}, d), one for each anchor, got {tuple(rows.shape)}")
    dtype = torch.promote_types(torch.promote_types(targets.dtype, anchors.dtype), torch.float32)
    return targets.detach().to(dtype), anchors.detach().to(dtype)


def without_vector(x: Tensor) -> Tensor:
    """``(T,)`` bool: rows of zeros, which stand for tokens that were never trained."""
    return ~x.any(dim=1)
