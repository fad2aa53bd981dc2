"""The price of a latent vector, with so much of it free in each dimension that none collapses."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["free_bits", "kl_by_dimension"]


def kl_by_dimension(mean: Tensor, log_std: Tensor) -> Tensor:
    """``KL(N(mean, std^2) || N(0, 1)) = (mean^2 + std^2 - 1 - 2 log std) / 2`` in nats, elementwise."""
    # expm1 keeps what is left of std^2 - 1 near a std of 1, where a collapsed dimension is
    return 0.5 * (mean.square() + torch.expm1(2 * log_std) - 2 * log_std)


def free_bits(kl: Tensor, floor: float) -> Tensor:
    """``max(kl, floor)``: below the floor a dimension costs the same whatever it says, and has no gradient.

    Source: clipping of arXiv 2510.27688, after arXiv 1606.04934. A floor of 0 leaves the divergence as it is.
    """
    # torch.clamp lets the gradient through where both are equal, as it must be for a floor of 0
    return kl.clamp(min=floor)
