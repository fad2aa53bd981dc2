"""Flow matching: a head that carries noise to the data along straight paths."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.calm.heads.base import normal
from quickmerge.calm.heads.sampled import DenoisingHead

__all__ = ["DiffusionHead", "FlowHead"]


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


# Diffusion: a head that takes noise away a little at a time, and adds a little less back.


class DiffusionHead(DenoisingHead):
    """Head that undoes the mixing of the data with noise by the cosine schedule.

    At time t in (0, 1] a target y and noise e are mixed to ``x_t = a y + s e`` with ``a = cos(pi t / 2)`` and
    ``s = sin(pi t / 2)``. The network learns the mean of ``v = a e - s y``, of which both follow: ``y = a x_t - s v``.
    A draw starts as noise at t = 1 and is taken to t = 0 in even steps by the posterior of the mixing: from t to u < t,
    with ``k = a_t / a_u`` and ``r = s_t^2 - k^2 s_u^2``, the next one is normal with mean
    ``k (s_u / s_t)^2 x_t + a_u r / s_t^2 y`` and variance ``r (s_u / s_t)^2``. As y is not known but by its mean, draws
    are a little too near to one another: by 3 % of the spread for normal data of spread 0.4 and 100 steps.

    Schedule: arXiv 2102.09672 in continuous time; v: arXiv 2202.00512; the head: arXiv 2406.11838.

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.
        blocks: as for `DenoisingHead`, as are ``hidden`` and ``samples``.
        hidden: see there.
        samples: see there.
        steps: from noise to a draw.
    """

    name: ClassVar[str] = "diffusion"
    source: ClassVar[str] = "arXiv 2406.11838"

    def __init__(
        self,
        context: int,
        width: int,
        *,
        blocks: int = 2,
        hidden: int | None = None,
        samples: int = 4,
        steps: int = 100,
    ) -> None:
        super().__init__(context, width, blocks=blocks, hidden=hidden, samples=samples, steps=steps)

    def noised(self, data: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The mixture and its v; as `DenoisingHead.noised`."""
        signal, spread = (time * math.pi / 2).cos(), (time * math.pi / 2).sin()
        return signal * data + spread * noise, signal * noise - spread * data

    def walk(self, x: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        """Step back in time; as `DenoisingHead.walk`, with fresh noise in each step but the last."""
        for step in range(self.steps, 0, -1):
            now, then = (math.pi / 2 * at / self.steps for at in (step, step - 1))
            v = self.network(x, x.new_tensor(step / self.steps), context)
            data = math.cos(now) * x - math.sin(now) * v
            keep = math.cos(now) / math.cos(then)
            fresh = math.sin(now) ** 2 - (keep * math.sin(then)) ** 2
            left = (math.sin(then) / math.sin(now)) ** 2
            x = keep * left * x + math.cos(then) * fresh / math.sin(now) ** 2 * data
            if step > 1:
                x = x + math.sqrt(fresh * left) * normal(x.shape, x.dtype, x.device, generator)
        return x
