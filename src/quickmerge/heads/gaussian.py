"""A Gaussian with independent dimensions: the simplest density over the next vector."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quickmerge.heads.base import VectorHead, check_temperature, normal, result_dtype

HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)
UNIT = math.log(math.expm1(1))  # softplus of this is 1, so that a new head starts with spreads near 1


def check_floor(floor: float) -> None:
    """Raise ValueError unless ``floor`` is a finite positive number."""
    number = isinstance(floor, (int, float)) and not isinstance(floor, bool)
    if not number or not 0 < floor < math.inf:
        raise ValueError(f"floor must be a finite number above 0, got {floor!r}")


def floored_std(raw: Tensor, floor: float) -> Tensor:
    """``floor + softplus(raw + UNIT)``: smooth, never below ``floor``, linear where it is large; any shape."""
    return floor + F.softplus(raw + UNIT)


def gaussian_nll(target: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``sum_d (y_d - m_d)^2 / (2 s_d^2) + log s_d + log(2 pi) / 2`` in nats, ``(..., D)`` to ``(...)``."""
    return (0.5 * ((target - mean) / std).square() + std.log() + HALF_LOG_TAU).sum(-1)


class GaussianHead(VectorHead):
    """Diagonal Gaussian whose mean and standard deviation are linear in the context, the latter before a softplus.

    The loss is the negative log-likelihood in nats, summed over the D dimensions. At ``temperature`` T the standard
    deviation is multiplied by sqrt(T), which is exactly the density to the power 1/T; T = 0 gives the mean.

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.
        floor: the smallest standard deviation, in units of the target. Without it a dimension that never changes
            would drive the density to infinity; targets should have a scale of about 1.
    """

    name: ClassVar[str] = "gaussian"
    is_density: ClassVar[bool] = True

    def __init__(self, context: int, width: int, *, floor: float = 0.05) -> None:
        super().__init__(context, width)
        check_floor(floor)
        self.floor = float(floor)
        self.to_mean = nn.Linear(context, width)
        self.to_raw = nn.Linear(context, width)
        # The first spreads are near 1 for every context: errors in the mean are learned before the spread.
        nn.init.zeros_(self.to_raw.weight)
        nn.init.zeros_(self.to_raw.bias)

    def moments(self, context: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, both ``(..., D)``, in ``dtype`` or that of results."""
        self.check_context(context)
        dtype = dtype or result_dtype(context)
        x = context.to(self.to_mean.weight.dtype)
        return self.to_mean(x).to(dtype), floored_std(self.to_raw(x).to(dtype), self.floor)

    def loss(self, context: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood of each position in nats, ``(...)``; as `VectorHead.loss`."""
        self.check_context(context)
        self.check_target(target, (*context.shape[:-1], self.width))
        dtype = result_dtype(context, target)
        mean, std = self.moments(context, dtype)
        return gaussian_nll(target.to(dtype), mean, std)

    def mean(self, context: Tensor) -> Tensor:
        """Mean of the next vector, ``(..., D)``; as `VectorHead.mean`."""
        return self.moments(context)[0]

    def sample(self, context: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """One draw, ``(..., D)``, with the standard deviation times sqrt(temperature); as `VectorHead.sample`."""
        check_temperature(temperature)
        mean, std = self.moments(context)
        if temperature == 0:
            return mean
        return mean + std * math.sqrt(temperature) * normal(mean.shape, mean.dtype, mean.device, generator)
