"""A mixture of Gaussians: a density that can say "this, or that, but nothing between"."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from quickmerge.errors import whole_number
from quickmerge.heads.base import VectorHead, check_temperature, normal, result_dtype, uniform
from quickmerge.heads.gaussian import check_floor, floored_std, gaussian_nll


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
