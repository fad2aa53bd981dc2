"""Flow matching: a head that carries noise to the data along straight paths."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.heads.sampled import DenoisingHead

__all__ = ["FlowHead"]


class FlowHead(DenoisingHead):
    """Head that learns the velocity of straight paths from noise to the data.

    On the path ``x_t = (1 - t) e + t y`` from noise e to a target y the velocity is ``y - e``; the network learns its
    mean given x_t, t and the context. A draw follows that velocity from noise at t = 0 to t = 1 by the midpoint rule,
    which asks the network twice a step.

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.
        blocks: as for `DenoisingHead`, as are ``hidden`` and ``samples``.
        hidden: see there.
        samples: see there.
        steps: of the midpoint rule.
    """

    name: ClassVar[str] = "flow"
    source: ClassVar[str] = "arXiv 2210.02747"

    def __init__(
        self,
        context: int,
        width: int,
        *,
        blocks: int = 2,
        hidden: int | None = None,
        samples: int = 4,
        steps: int = 10,
    ) -> None:
        super().__init__(context, width, blocks=blocks, hidden=hidden, samples=samples, steps=steps)

    def noised(self, data: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """A point of the path and the velocity there; as `DenoisingHead.noised`."""
        return torch.lerp(noise, data, time), data - noise

    def walk(self, x: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        """Follow the velocity; as `DenoisingHead.walk`, without further noise."""
        size = 1 / self.steps
        for step in range(self.steps):
            time = x.new_tensor(step * size)
            middle = x + size / 2 * self.network(x, time, context)
            x = x + size * self.network(middle, time + size / 2, context)
        return x
