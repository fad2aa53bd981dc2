"""The Gaussian head against its density said slowly."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from heads_cases import batch, lively, normals, slow_linear, slow_log_normal, slow_std
from hypothesis import given
from strategies import generator, prop, seeds

from quickmerge.calm.heads import GaussianHead


def gaussian(context: int, width: int, seed: int, floor: float = 0.05) -> GaussianHead:
    head = GaussianHead(context, width, floor=floor)
    lively(head, seed)
    return head


@prop(40)
@given(seed=seeds)
def test_loss_is_the_formula(seed: int) -> None:
    rng = Random(seed)
    shape, c, d, floor = batch(rng), rng.choice((1, 3, 7)), rng.choice((1, 2, 5)), rng.choice((1e-3, 0.05, 2.0))
    dtype = rng.choice((torch.float64, torch.float32, torch.bfloat16))
    head = gaussian(c, d, seed, floor).to(torch.float64 if dtype == torch.float64 else torch.float32)
    context, target = normals((*shape, c), seed, dtype), normals((*shape, d), seed + 1, dtype)
    got = head.loss(context, target).flatten().tolist()
    rows = zip(got, context.reshape(-1, c).tolist(), target.reshape(-1, d).tolist(), strict=True)
    for loss, x, y in rows:
        means, raws = slow_linear(head.to_mean, x), slow_linear(head.to_raw, x)
        stds = [slow_std(raw, floor) for raw in raws]
        want = -math.fsum(slow_log_normal(*parts) for parts in zip(y, means, stds, strict=True))
        assert loss == pytest.approx(want, rel=1e-9 if dtype == torch.float64 else 1e-3, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_density_integrates_to_one(seed: int) -> None:
    head = gaussian(2, 1, seed).double()
    y = torch.linspace(-80, 80, 200_001, dtype=torch.float64)[:, None]
    density = (-head.loss(normals((2,), seed).expand(len(y), 2), y)).exp().detach()
    assert float(torch.trapezoid(density, y[:, 0])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.25, 2])
def test_samples_have_the_moments(temperature: float) -> None:
    head, context = gaussian(3, 4, 1), normals((3,), 2, torch.float32)
    mean, std = head.moments(context)
    n = 40_000
    x = head.sample(context.expand(n, 3), temperature=temperature, generator=generator(0))
    want = std * temperature**0.5
    assert ((x.mean(0) - mean).abs() < 5 * want / n**0.5).all()
    torch.testing.assert_close(x.std(0), want, rtol=5 / (2 * n) ** 0.5, atol=0)
    correlation = torch.corrcoef(x.T) - torch.eye(4)
    assert correlation.abs().max() < 5 / n**0.5


def test_temperature_zero_is_the_mean() -> None:
    head, context = gaussian(3, 4, 1), normals((2, 5, 3), 2)
    assert torch.equal(head.sample(context, temperature=0), head.mean(context))


def test_a_constant_target_cannot_drive_the_density_past_the_floor() -> None:
    head = GaussianHead(2, 3, floor=0.1)
    best = 3 * math.log(0.1 * math.sqrt(2 * math.pi))
    with torch.no_grad():
        head.to_raw.bias.fill_(-1e4)
        head.to_mean.weight.zero_()
        head.to_mean.bias.zero_()
    context = torch.randn(5, 2, generator=generator(0)).requires_grad_()
    loss = head.loss(context, torch.zeros(5, 3))
    torch.testing.assert_close(loss, torch.full((5,), best))
    loss.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())


def test_a_new_head_starts_with_spreads_near_one() -> None:
    _, std = GaussianHead(5, 3).moments(normals((7, 5), 0))
    torch.testing.assert_close(std, torch.full_like(std, 1.05))


def test_training_recovers_a_spread_that_depends_on_the_context() -> None:
    torch.manual_seed(0)
    head = GaussianHead(1, 1)
    optimiser = torch.optim.Adam(head.parameters(), lr=0.03)
    context = (torch.rand(2000, 1) < 0.5).float()
    target = 2 - 3 * context + (0.3 + context) * torch.randn(2000, 1)
    for _ in range(400):
        optimiser.zero_grad()
        head.loss(context, target).mean().backward()
        optimiser.step()
    mean, std = head.moments(torch.tensor([[0.0], [1.0]]))
    torch.testing.assert_close(mean.flatten(), torch.tensor([2.0, -1.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(std.flatten(), torch.tensor([0.3, 1.3]), atol=0.08, rtol=0)
