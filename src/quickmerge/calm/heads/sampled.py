"""The network of heads that clean noise away step by step: it reads a noisy vector, a time and the context."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quickmerge.calm.heads.base import VectorHead, normal, result_dtype
from quickmerge.errors import whole_number

__all__ = ["DenoisingHead", "SamplingHead", "TimedNetwork", "waves"]


FASTEST, SLOWEST = 1000.0, 0.1  # radians over the whole of time, so that neighbouring steps of any solver differ


def waves(time: Tensor, features: int) -> Tensor:
    """Cosines and sines of ``time (...)`` in [0, 1], ``(..., features)``: half of each, frequencies in even ratios."""
    share = torch.arange(features // 2, dtype=time.dtype, device=time.device) / max(1, features // 2 - 1)
    angles = time[..., None] * FASTEST * (SLOWEST / FASTEST) ** share
    return torch.cat([angles.cos(), angles.sin()], -1)


def _shifted(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``norm(x) (1 + scale) + shift``, with a norm that has no weights of its own."""
    return F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


class ModulatedBlock(nn.Module):
    """Residual network ``x + g * W2 silu W1 (norm(x) (1 + s) + b)``; g, s and b are linear in the condition."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.modulation = nn.Linear(hidden, 3 * hidden)
        self.up = nn.Linear(hidden, hidden)
        self.down = nn.Linear(hidden, hidden)
        nn.init.zeros_(self.modulation.weight)  # at first each block passes on what it reads
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x (S, ..., H)`` and a ``condition`` that broadcasts against it to ``(S, ..., H)``."""
        shift, scale, gate = self.modulation(condition).chunk(3, -1)
        out: Tensor = x + gate * self.down(F.silu(self.up(_shifted(x, shift, scale))))
        return out


class TimedNetwork(nn.Module):
    """Adaptive-norm network of the diffusion head of masked autoregressive models (arXiv 2406.11838).

    Time and context are embedded and added; of the sum every block takes the shift, scale and gate of its norm. The
    last layer starts at zero, so that a new network says zero.

    Args:
        context: C, features of the context.
        width: D, features of the noisy vector and of what comes out.
        hidden: H, features inside.
        blocks: residual blocks, each of 5 H^2 weights.
    """

    def __init__(self, context: int, width: int, hidden: int, blocks: int) -> None:
        super().__init__()
        self.features = hidden + hidden % 2
        self.read_vector = nn.Linear(width, hidden)
        self.read_context = nn.Linear(context, hidden)
        self.read_time = nn.Sequential(nn.Linear(self.features, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.blocks = nn.ModuleList(ModulatedBlock(hidden) for _ in range(blocks))
        self.modulation = nn.Linear(hidden, 2 * hidden)
        self.last = nn.Linear(hidden, width)
        for layer in (self.modulation, self.last):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """What the network makes of noisy vectors.

        Args:
            x: ``(S, ..., D)``, S noisy vectors for each position.
            time: ``(S, ...)``, or ``()`` if it is the same for all: then the modulation runs once for all S.
            context: ``(..., C)``.

        Returns:
            ``(S, ..., D)``, in the dtype of ``x``, whatever that of the weights.
        """
        inside = self.last.weight.dtype
        # The waves before any rounding: bfloat16 would take different times for one.
        when = self.read_time(waves(time, self.features).to(inside))
        condition = F.silu(when + self.read_context(context.to(inside)))
        state = self.read_vector(x.to(inside))
        for block in self.blocks:
            state = block(state, condition)
        shift, scale = self.modulation(condition).chunk(2, -1)
        out: Tensor = self.last(_shifted(state, shift, scale)).to(x.dtype)
        return out


# What heads share that are known by their samples and trained by undoing noise.


STEPS = 10_000
USUAL = 16  # fewest features inside unless asked for: a narrow context must not make for a narrow network


class SamplingHead(VectorHead):
    """A head that draws without knowing a density: any number of draws, and a loss that takes many draws of the truth.

    A subclass sets ``samples``, how many draws `mean` takes, and implements `draws` and `loss`.
    """

    is_density: ClassVar[bool] = False
    samples: int

    @abstractmethod
    def draws(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` independent draws of the next vector for each position, ``(..., C)`` to ``(count, ..., D)``.

        ValueError for a wrong shape or dtype of the context or a count below 1.
        """

    @abstractmethod
    def loss(self, context: Tensor, target: Tensor, *, many_targets: bool = False) -> Tensor:
        """As `VectorHead.loss`, ``(...)``; with ``many_targets`` a target is ``(M, ..., D)``, M draws of the truth."""

    def mean(self, context: Tensor) -> Tensor:
        """Mean of ``samples`` fresh draws, ``(..., D)``: an estimate, as there is no formula; as `VectorHead.mean`."""
        return self.draws(context, self.samples).mean(0)

    def sample(self, context: Tensor, *, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """One draw, ``(..., D)``; as `VectorHead.sample`, but a temperature other than 1 is a ValueError."""
        if isinstance(temperature, bool) or temperature != 1:
            raise ValueError(
                f"temperature must be 1 for the {self.name} head, which has no density that could be sharpened, "
                f"got {temperature!r}"
            )
        return self.draws(context, 1, generator)[0]

    def many(self, context: Tensor, target: Tensor, many_targets: bool) -> Tensor:
        """The target as ``(M, ..., D)``, checked; without ``many_targets`` M is 1."""
        self.check_context(context)
        shape = (*context.shape[:-1], self.width)
        if not many_targets:
            self.check_target(target, shape)
            return target[None]
        if target.ndim == 0 or target.shape[0] == 0:
            wanted = ", ".join(["M", *map(str, shape)])
            raise ValueError(f"target must have shape ({wanted}) with M of at least 1, got {tuple(target.shape)}")
        self.check_target(target, (target.shape[0], *shape))
        return target


class DenoisingHead(SamplingHead):
    """A head whose network learns the way from noise to the data, and walks it in ``steps`` steps to draw.

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.
        blocks: residual blocks of the network, each of 5 hidden^2 weights.
        hidden: features inside, at least 3; None for C, but no fewer than 16.
        samples: noisy targets for each position in `loss`, and draws in `mean`. Each has its own noise and time; of
            many targets, they are made of as many of the first ones as there are.
        steps: of the walk, in [1, 10000].

    A subclass implements `noised` and `walk`.
    """

    def __init__(
        self,
        context: int,
        width: int,
        *,
        blocks: int = 2,
        hidden: int | None = None,
        samples: int = 4,
        steps: int,
    ) -> None:
        super().__init__(context, width)
        blocks = whole_number("blocks", blocks)
        if hidden is not None:
            hidden = whole_number("hidden", hidden, 3)
        samples = whole_number("samples", samples)
        steps = whole_number("steps", steps)
        if steps > STEPS:
            raise ValueError(f"steps must be a whole number of at least 1 and at most {STEPS}, got {steps}")
        self.samples = samples
        self.steps = steps
        self.network = TimedNetwork(context, width, max(context, USUAL) if hidden is None else hidden, blocks)

    @abstractmethod
    def noised(self, data: Tensor, noise: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy vector at ``time (..., 1)`` and what the network shall say of it, both shaped as ``data``."""

    @abstractmethod
    def walk(self, x: Tensor, context: Tensor, generator: torch.Generator | None) -> Tensor:
        """From standard normal noise ``x (S, ..., D)`` to draws of the same shape."""

    def loss(self, context: Tensor, target: Tensor, *, many_targets: bool = False) -> Tensor:
        """Squared error of what the network says of noisy targets, mean over features; as `SamplingHead.loss`.

        Noise and times come from the global generator, so that two calls differ. No likelihood: for each context it
        is lowest where the network gives the conditional mean, from which `draws` has the distribution of the targets
        but for the error of the finite number of steps.
        """
        target = self.many(context, target, many_targets)
        dtype = result_dtype(context, target)
        used = torch.arange(self.samples, device=target.device) % target.shape[0]
        data = target.to(dtype)[used]
        noise = normal(data.shape, dtype, data.device, None)
        time = spread_times(self.samples, context.shape[:-1], dtype, data.device)
        x, wanted = self.noised(data, noise, time[..., None])
        said: Tensor = self.network(x, time, context)
        return (said - wanted).square().mean(-1).mean(0)

    def draws(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` independent draws for each position, ``(count, ..., D)``; as `SamplingHead.draws`."""
        self.check_context(context)
        count = whole_number("count", count)
        dtype = result_dtype(context)
        x = normal((count, *context.shape[:-1], self.width), dtype, context.device, generator)
        return self.walk(x, context, generator)


def spread_times(count: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``(count, *shape)`` random times in (0, 1], each uniform in a part of its own: number j in
    ``(j, j + 1] / count``.

    Their mean over j expects what that of independent uniform times does, with less variance.
    """
    part = torch.arange(1, count + 1, dtype=dtype, device=device).view(-1, *[1] * len(shape))
    return (part - torch.rand((count, *shape), dtype=dtype, device=device)) / count
