"""A Gaussian with independent dimensions: the simplest density over the next vector."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quickmerge.calm.heads.base import VectorHead, check_temperature, normal, result_dtype, uniform
from quickmerge.errors import whole_number

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


# A mixture of Gaussians: a density that can say "this, or that, but nothing between".


class MixtureHead(VectorHead):
    """Mixture of diagonal Gaussians; weights, means and spreads are linear in the context.

    The loss is ``-log sum_k w_k N(y; m_k, s_k)`` in nats. At ``temperature`` T every standard deviation is
    multiplied by sqrt(T) and the weights become ``w_k^(1/T)``, normalised: of each component its power 1/T, as of
    a single Gaussian, though not exactly the power 1/T of their sum. T = 0 gives the mean of the component of the
    largest weight, which is the limit of small T.

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.
        components: K, how many Gaussians.
        floor: the smallest standard deviation, in units of the target; see `GaussianHead`.
    """

    name: ClassVar[str] = "mixture"
    source: ClassVar[str] = "Bishop 1994, Mixture Density Networks"
    is_density: ClassVar[bool] = True

    def __init__(self, context: int, width: int, *, components: int = 8, floor: float = 0.05) -> None:
        super().__init__(context, width)
        components = whole_number("components", components)
        check_floor(floor)
        self.components = components
        self.floor = float(floor)
        self.to_logits = nn.Linear(context, components)
        self.to_means = nn.Linear(context, components * width)
        self.to_raw = nn.Linear(context, components * width)
        # All components start equally likely and equally wide, but in different places: equal ones would get
        # equal gradients for ever.
        for layer in (self.to_logits, self.to_raw):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.to_means.bias)

    def parts(self, context: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights ``(..., K)``, means and standard deviations ``(..., K, D)``, in ``dtype`` or that of results."""
        self.check_context(context)
        dtype = dtype or result_dtype(context)
        x = context.to(self.to_means.weight.dtype)
        shape = (*context.shape[:-1], self.components, self.width)
        means = self.to_means(x).to(dtype).view(shape)
        stds = floored_std(self.to_raw(x).to(dtype), self.floor).view(shape)
        return self.to_logits(x).to(dtype).log_softmax(-1), means, stds

    def loss(self, context: Tensor, target: Tensor) -> Tensor:
        """Negative log-likelihood of each position in nats, ``(...)``; as `VectorHead.loss`."""
        self.check_context(context)
        self.check_target(target, (*context.shape[:-1], self.width))
        dtype = result_dtype(context, target)
        log_weights, means, stds = self.parts(context, dtype)
        nll = gaussian_nll(target.to(dtype)[..., None, :], means, stds)
        return -(log_weights - nll).logsumexp(-1)

    def mean(self, context: Tensor) -> Tensor:
        """Mean of the next vector, that of the components by weight, ``(..., D)``; as `VectorHead.mean`."""
        log_weights, means, _ = self.parts(context)
        return (log_weights.exp()[..., None] * means).sum(-2)

    def sample(self, context: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """One draw of a component and then of its Gaussian, ``(..., D)``; as `VectorHead.sample`."""
        check_temperature(temperature)
        log_weights, means, stds = self.parts(context)
        if temperature == 0:
            return _pick(means, log_weights.argmax(-1))
        # The component in whose share of [0, 1) the number falls; rounding may leave the shares just short of 1.
        ends = (log_weights / temperature).softmax(-1).cumsum(-1)
        place = uniform((*ends.shape[:-1], 1), ends.dtype, ends.device, generator)
        chosen = (ends <= place).sum(-1).clamp_max(self.components - 1)
        mean, std = _pick(means, chosen), _pick(stds, chosen)
        return mean + std * math.sqrt(temperature) * normal(mean.shape, mean.dtype, mean.device, generator)


def _pick(parts: Tensor, chosen: Tensor) -> Tensor:
    """Of ``parts (..., K, D)`` the one at ``chosen (...)`` for each position, ``(..., D)``."""
    return parts.take_along_dim(chosen[..., None, None], -2).squeeze(-2)
