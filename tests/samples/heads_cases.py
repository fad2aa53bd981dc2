"""Heads with lively weights, and the energy score said slowly."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from random import Random
from typing import Any

import torch
from strategies import generator
from torch import Tensor

from quickmerge.calm.heads import HEADS, VectorHead, make_head

NAMES = tuple(HEADS)
DENSITIES = tuple(name for name, cls in HEADS.items() if cls.is_density)
SMALL: dict[str, dict[str, Any]] = {
    "gaussian": {},
    "mixture": {"components": 3},
    "energy": {"noise": 5, "hidden": 6, "samples": 3},
    "flow": {"hidden": 6, "samples": 3, "steps": 3},
    "diffusion": {"hidden": 6, "samples": 3, "steps": 4},
}


def lively(head: VectorHead, seed: int) -> VectorHead:
    """The head with all its weights random: fresh ones hold zeros, and zeros hide mistakes."""
    rng = generator(seed)
    with torch.no_grad():
        for weight in head.parameters():
            noise = torch.randn(weight.shape, generator=rng, dtype=torch.float64)
            weight.copy_(noise * 0.7)
    return head


def small(name: str, context: int = 4, width: int = 3, seed: int = 0, **settings: Any) -> VectorHead:
    return lively(make_head(name, context, width, **{**SMALL[name], **settings}), seed)


def batch(rng: Random) -> tuple[int, ...]:
    """One or two leading dimensions of odd sizes."""
    return tuple(rng.choice((1, 2, 3, 5)) for _ in range(rng.randint(1, 2)))


def normals(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(tuple(shape), generator=generator(seed), dtype=torch.float64).to(dtype)


def slow_linear(layer: Any, x: list[float]) -> list[float]:
    weight, bias = layer.weight.double().tolist(), layer.bias.double().tolist()
    return [math.fsum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def slow_std(raw: float, floor: float) -> float:
    """Softplus moved so that it is 1 at 0, on top of the floor."""
    return floor + math.log1p(math.exp(raw) * (math.e - 1))


def slow_log_normal(y: float, mean: float, std: float) -> float:
    return -0.5 * ((y - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def slow_energy(samples: list[list[float]], targets: list[list[float]], alpha: float) -> float:
    n, m = len(samples), len(targets)
    across = math.fsum(math.dist(x, y) ** alpha for x in samples for y in targets)
    within = math.fsum(math.dist(x, z) ** alpha for x, z in itertools.permutations(samples, 2))
    return 2 / (n * m) * across - within / (n * (n - 1))


def slope(function: Any, x: Tensor, at: int, step: float = 1e-6) -> float:
    """Central difference of the scalar ``function`` in one element of ``x``, which is put back."""
    flat = x.detach().view(-1)
    before = float(flat[at])
    flat[at] = before + step
    above = float(function().detach())
    flat[at] = before - step
    below = float(function().detach())
    flat[at] = before
    return (above - below) / (2 * step)
