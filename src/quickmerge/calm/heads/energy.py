"""A head that makes samples and knows no density, trained by the energy score."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from quickmerge.calm.heads.base import result_dtype, uniform
from quickmerge.calm.heads.sampled import USUAL, SamplingHead
from quickmerge.errors import whole_number

EPS = 1e-12  # added to squared distances: below every distance that matters, above where gradients overflow
BLOCK = 8  # targets measured at once: on a GPU the gradient of a block holds samples x BLOCK x D numbers per position
LEAST = 3  # a norm over two features leaves only their order of the noise, and over one feature nothing


def check_alpha(alpha: float) -> None:
    """Raise ValueError unless ``alpha`` is strictly between 0 and 2."""
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not 0 < alpha < 2:
        raise ValueError(
            f"alpha must be a number strictly between 0 and 2 (at 2 the score no longer sees the spread), got {alpha!r}"
        )


def _powers(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    """``(|x_n - y_m|^2 + EPS)^(alpha / 2)`` for ``x (..., N, D)`` and ``y (..., M, D)``, as ``(..., N, M)``.

    EPS keeps gradients finite where two points meet and alpha < 1. The score stays strictly proper with it: this
    too is a conditionally negative definite kernel.
    """
    # Plain differences. The faster way through |x|^2 + |y|^2 - 2 x.y loses short distances between long vectors.
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() + EPS).pow(alpha / 2)


def energy_score(samples: Tensor, targets: Tensor, alpha: float = 1.0) -> Tensor:
    """Energy score of a distribution that is known by samples only; lower is better.

    ``2 / (N M) sum_nm |x_n - y_m|^alpha - 1 / (N (N - 1)) sum_{n != k} |x_n - x_k|^alpha``, an unbiased estimate of
    ``2 E|x - y|^alpha - E|x - x'|^alpha``. Strictly proper for 0 < alpha < 2 (Gneiting and Raftery 2007), so that it
    is lowest on average when the samples have the distribution of the targets.

    Args:
        samples: ``(N, ..., D)``, independent draws x of the model for each position; at least two.
        targets: ``(M, ..., D)``, draws y of the truth; one will do.
        alpha: exponent of the distances.

    Returns:
        ``(...)``, float32 or float64 if an input is. Distances come without an ``(N, M, ..., D)`` tensor, and
        gradients are finite where points coincide.

    Raises:
        ValueError: for an alpha outside (0, 2), fewer than two samples, no target, shapes that do not fit or a
            dtype that is not floating point.
    """
    check_alpha(alpha)
    if samples.ndim < 2 or samples.shape[0] < 2:
        raise ValueError(f"samples must have shape (N, ..., D) with N of at least 2, got {tuple(samples.shape)}")
    if targets.ndim < 2 or targets.shape[0] < 1 or targets.shape[1:] != samples.shape[1:]:
        wanted = ", ".join(["M", *map(str, samples.shape[1:])])
        raise ValueError(
            f"targets must have shape ({wanted}) with M of at least 1 to fit the samples, got {tuple(targets.shape)}"
        )
    for name, given in (("samples", samples), ("targets", targets)):
        if not given.is_floating_point():
            raise ValueError(f"{name} must be of floating point, got {given.dtype}")
    dtype = result_dtype(samples, targets)
    x = samples.to(dtype).movedim(0, -2).contiguous()
    y = targets.to(dtype).movedim(0, -2)
    n, m = x.shape[-2], y.shape[-2]
    across = x.new_zeros(x.shape[:-2])
    for start in range(0, m, BLOCK):
        across = across + _powers(x, y[..., start : start + BLOCK, :], alpha).sum((-2, -1))
    # The diagonal is no pair. It is EPS^(alpha / 2), not zero, so it has to be left out of the sum.
    pairs = ~torch.eye(n, dtype=torch.bool, device=x.device)
    within = _powers(x, x, alpha).masked_fill(~pairs, 0).sum((-2, -1))
    return 2 / (n * m) * across - within / (n * (n - 1))


class GatedBlock(nn.Module):
    """Residual gated network on the noise path, conditioned on the context.

    ``x + W (silu(a) * b)`` with ``[a; b] = L3 silu L2 silu L1 [norm(x); c]``. L1 is two linear maps that are added,
    so that the one of the context runs once for all draws.
    """

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden)
        self.from_noise = nn.Linear(hidden, hidden)
        self.from_context = nn.Linear(hidden, hidden, bias=False)
        self.middle = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, 2 * hidden)
        self.down = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``x (S, ..., H)`` and ``context (..., H)`` to ``(S, ..., H)``."""
        inner = F.silu(self.from_noise(self.norm(x)) + self.from_context(context))
        a, b = self.gate(F.silu(self.middle(inner))).chunk(2, -1)
        out: Tensor = x + self.down(F.silu(a) * b)
        return out


class EnergyHead(SamplingHead):
    """Likelihood-free head of CALM (arXiv 2510.27688): noise in, a sample out, in one pass.

    Uniform noise in [-0.5, 0.5) and the context each go through a linear map and a norm; gated residual blocks on
    the noise path read the context; a two-layer network gives the vector. Its last layer starts at zero, so the
    first samples are all zero. The loss is the `energy_score` of ``samples`` fresh draws against the target, with
    noise of the global generator: it is a random number with the right mean, not the same on two calls.

    Args:
        context: C, features of the context vector.
        width: D, features of the vector that is predicted.
        noise: features of the noise.
        blocks: gated blocks, each of 6 hidden^2 weights.
        hidden: features inside, at least 3; None for C, but no fewer than 16.
        samples: draws for each position in `loss` and in `mean`; at least 2.
        alpha: exponent of the energy score, in (0, 2).
    """

    name: ClassVar[str] = "energy"
    source: ClassVar[str] = "arXiv 2510.27688"

    def __init__(
        self,
        context: int,
        width: int,
        *,
        noise: int = 64,
        blocks: int = 2,
        hidden: int | None = None,
        samples: int = 8,
        alpha: float = 1.0,
    ) -> None:
        super().__init__(context, width)
        noise = whole_number("noise", noise)
        blocks = whole_number("blocks", blocks)
        if hidden is not None:
            hidden = whole_number("hidden", hidden, LEAST)
        samples = whole_number("samples", samples, 2)
        check_alpha(alpha)
        self.noise = noise
        self.samples = samples
        self.alpha = float(alpha)
        inner = max(context, USUAL) if hidden is None else hidden
        self.read_noise = nn.Sequential(nn.Linear(noise, inner), nn.LayerNorm(inner))
        self.read_context = nn.Sequential(nn.Linear(context, inner), nn.LayerNorm(inner))
        self.blocks = nn.ModuleList(GatedBlock(inner) for _ in range(blocks))
        self.last = nn.Linear(inner, width)
        self.out = nn.Sequential(nn.LayerNorm(inner), nn.Linear(inner, inner), nn.SiLU())
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def draws(self, context: Tensor, count: int, generator: torch.Generator | None = None) -> Tensor:
        """``count`` independent draws of the next vector for each position, ``(..., C)`` to ``(count, ..., D)``.

        ValueError for a wrong shape or dtype of the context or a count below 1.
        """
        self.check_context(context)
        count = whole_number("count", count)
        dtype = result_dtype(context)
        inside = self.last.weight.dtype
        # Noise in the dtype of results and then rounded, so that a bfloat16 head sees the draws of a float32 one.
        noise = uniform((count, *context.shape[:-1], self.noise), dtype, context.device, generator)
        x = self.read_noise((noise - 0.5).to(inside))
        c = self.read_context(context.to(inside))
        for block in self.blocks:
            x = block(x, c)
        out: Tensor = self.last(self.out(x)).to(dtype)
        return out

    def loss(self, context: Tensor, target: Tensor, *, many_targets: bool = False) -> Tensor:
        """Energy score of ``samples`` fresh draws for each position; as `VectorHead.loss`.

        Args:
            context: ``(..., C)``.
            target: ``(..., D)``, or ``(M, ..., D)`` with ``many_targets``: M draws of the truth for each position.
            many_targets: whether the target has the dimension M in front.

        Returns:
            ``(...)``; not a likelihood, so its exponential is no perplexity.
        """
        target = self.many(context, target, many_targets)
        return energy_score(self.draws(context, self.samples), target, self.alpha)
