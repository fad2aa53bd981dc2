"""The network of heads that clean noise away step by step: it reads a noisy vector, a time and the context."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["TimedNetwork", "waves"]

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
