"""What every output head is: from a context vector to a distribution over the next vector."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from quickmerge.errors import whole_number


class VectorHead(nn.Module, ABC):
    """Base of all heads: "given a context vector, what is the next vector?"

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.

    A subclass sets ``name`` (what `make_head` calls it), ``source`` (paper) and ``is_density``, and implements
    `loss`, `mean` and `sample`. Contexts are ``(..., C)`` and vectors ``(..., D)`` with any number of leading
    dimensions, none included. Whatever dtype the parameters have, results are float32, or float64 if an input is.
    """

    name: ClassVar[str]
    source: ClassVar[str] = ""
    is_density: ClassVar[bool]
    """True if `loss` is a negative log-likelihood in nats, False if it is another proper score."""

    context: int
    width: int

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        context = whole_number("context", context)
        width = whole_number("width", width)
        self.context = context
        self.width = width

    @abstractmethod
    def loss(self, context: Tensor, target: Tensor) -> Tensor:
        """A strictly proper score of each position: lower is better, and lowest on average at the truth.

        Args:
            context: ``(..., C)``.
            target: ``(..., D)``, what came next.

        Returns:
            ``(...)``, differentiable in both inputs and in the parameters.

        Raises:
            ValueError: for a wrong shape or a dtype that is not floating point.
        """

    @abstractmethod
    def mean(self, context: Tensor) -> Tensor:
        """Mean of the next vector, ``(..., C)`` to ``(..., D)``; ValueError as for `loss`."""

    @abstractmethod
    def sample(self, context: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """One draw of the next vector for each position.

        Args:
            context: ``(..., C)``.
            temperature: below 1 for draws nearer to what is most likely, 1 for the distribution itself.
            generator: where the noise comes from, on any device; None for the global generator.

        Returns:
            ``(..., D)``. Gradients flow unless the caller turns them off.

        Raises:
            ValueError: for a wrong shape or dtype, or a temperature that the head cannot do.
        """

    def forward(self, context: Tensor, target: Tensor) -> Tensor:
        """`loss`, so that hooks and wrappers such as data parallel ones see the head at work."""
        return self.loss(context, target)

    def check_context(self, context: Tensor) -> None:
        """Raise ValueError unless ``context`` is ``(..., C)`` of floating point."""
        if context.ndim == 0 or context.shape[-1] != self.context:
            raise ValueError(f"context must have shape (..., {self.context}), got {tuple(context.shape)}")
        if not context.is_floating_point():
            raise ValueError(f"context must be of floating point, got {context.dtype}")

    def check_target(self, target: Tensor, shape: Sequence[int]) -> None:
        """Raise ValueError unless ``target`` has this shape and is of floating point."""
        if tuple(target.shape) != tuple(shape):
            raise ValueError(f"target must have shape {tuple(shape)} for this context, got {tuple(target.shape)}")
        if not target.is_floating_point():
            raise ValueError(f"target must be of floating point, got {target.dtype}")


def check_temperature(temperature: float) -> None:
    """Raise ValueError unless ``temperature`` is a finite number of at least 0."""
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, got {temperature!r}")


def result_dtype(*inputs: Tensor) -> torch.dtype:
    """float32, or float64 if one of the inputs is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in inputs) else torch.float32


def normal(shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise."""
    # A generator draws on its own device only; a CPU seed must work for a model on a GPU too.
    origin = device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, dtype=dtype, device=origin).to(device)


def uniform(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Uniform noise in [0, 1)."""
    origin = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, dtype=dtype, device=origin).to(device)
