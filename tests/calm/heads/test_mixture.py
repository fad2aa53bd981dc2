"""The mixture head against its density said slowly."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from heads_cases import batch, lively, normals, slow_linear, slow_log_normal, slow_std
from hypothesis import given
from strategies import generator, prop, seeds

from quickmerge.calm.heads import GaussianHead, MixtureHead


def mixture(context: int, width: int, seed: int, components: int = 3, floor: float = 0.05) -> MixtureHead:
    head = MixtureHead(context, width, components=components, floor=floor)
    lively(head, seed)
    return head


def placed(logits: list[float], means: list[float], raw: float) -> MixtureHead:
    """A head of one feature that is the same mixture for every context."""
    head = MixtureHead(1, 1, components=len(logits))
    with torch.no_grad():
        for p in head.parameters():
            p.zero_()
        head.to_logits.bias.copy_(torch.tensor(logits))
        head.to_means.bias.copy_(torch.tensor(means))
        head.to_raw.bias.fill_(raw)
    return head


@prop(40)
@given(seed=seeds)
def test_loss_and_mean_are_the_formulas(seed: int) -> None:
    rng = Random(seed)
    shape, c, d, k = batch(rng), rng.choice((1, 3, 7)), rng.choice((1, 2, 5)), rng.choice((1, 2, 5))
    floor = rng.choice((0.01, 0.05, 2.0))
    dtype = rng.choice((torch.float64, torch.float32, torch.bfloat16))
    head = mixture(c, d, seed, k, floor).to(torch.float64 if dtype == torch.float64 else torch.float32)
    context, target = normals((*shape, c), seed, dtype), normals((*shape, d), seed + 1, dtype)
    near = 1e-9 if dtype == torch.float64 else 2e-3
    got = zip(head.loss(context, target).flatten().tolist(), head.mean(context).reshape(-1, d).tolist(), strict=True)
    rows = zip(got, context.reshape(-1, c).tolist(), target.reshape(-1, d).tolist(), strict=True)
    for (loss, mean), x, y in rows:
        weights = [math.exp(v) for v in slow_linear(head.to_logits, x)]
        means, raws = slow_linear(head.to_means, x), slow_linear(head.to_raw, x)
        logs = []
        for j in range(k):
            parts = [(y[i], means[j * d + i], slow_std(raws[j * d + i], floor)) for i in range(d)]
            logs.append(math.log(weights[j] / sum(weights)) + math.fsum(slow_log_normal(*part) for part in parts))
        top = max(logs)
        want = -top - math.log(math.fsum(math.exp(v - top) for v in logs))
        assert loss == pytest.approx(want, rel=near, abs=near)
        centre = [math.fsum(weights[j] * means[j * d + i] for j in range(k)) / sum(weights) for i in range(d)]
        assert mean == pytest.approx(centre, rel=near, abs=near)


def test_one_component_is_the_gaussian_head() -> None:
    head, twin = mixture(4, 3, 0, components=1), GaussianHead(4, 3)
    twin.to_mean.load_state_dict(head.to_means.state_dict())
    twin.to_raw.load_state_dict(head.to_raw.state_dict())
    context, target = normals((2, 5, 4), 1), normals((2, 5, 3), 2)
    torch.testing.assert_close(head.loss(context, target), twin.loss(context, target))
    torch.testing.assert_close(head.mean(context), twin.mean(context))


def test_a_target_far_from_every_component_is_finite() -> None:
    head = mixture(4, 3, 0)
    context = normals((5, 4), 1, torch.float32).requires_grad_()
    loss = head.loss(context, torch.full((5, 3), 1e6))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert context.grad is not None and context.grad.isfinite().all()


@pytest.mark.parametrize("seed", range(4))
def test_density_integrates_to_one(seed: int) -> None:
    head = mixture(2, 1, seed).double()
    y = torch.linspace(-80, 80, 200_001, dtype=torch.float64)[:, None]
    density = (-head.loss(normals((2,), seed).expand(len(y), 2), y)).exp().detach()
    assert float(torch.trapezoid(density, y[:, 0])) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_samples_have_the_moments(seed: int) -> None:
    head, context = mixture(3, 2, seed), normals((3,), seed, torch.float32)
    log_weights, means, stds = head.parts(context)
    weights = log_weights.exp()[:, None]
    mean = (weights * means).sum(0)
    variance = (weights * (stds.square() + means.square())).sum(0) - mean.square()
    n = 40_000
    x = head.sample(context.expand(n, 3), generator=generator(seed))
    assert ((x.mean(0) - mean).abs() < 5 * (variance / n).sqrt()).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.06, atol=0)
    torch.testing.assert_close(head.mean(context), mean)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_temperature_sharpens_each_component_and_the_choice(temperature: float) -> None:
    """Components so far apart that each sample tells which one it came from."""
    head = placed([0.0, math.log(3), math.log(2)], [-1000.0, 0.0, 1000.0], 0.0)
    n = 30_000
    x = head.sample(torch.zeros(n, 1), temperature=temperature, generator=generator(0))[:, 0]
    weights = torch.tensor([1.0, 3.0, 2.0]) ** (1 / temperature)
    for place, share in zip((-1000, 0, 1000), (weights / weights.sum()).tolist(), strict=True):
        near = x[(x - place).abs() < 100]
        assert len(near) / n == pytest.approx(share, abs=5 * (share * (1 - share) / n) ** 0.5)
        assert float((near - place).std().detach()) == pytest.approx(1.05 * temperature**0.5, rel=0.06)


def test_temperature_zero_is_the_mean_of_the_likeliest_component() -> None:
    head = placed([0.0, 1.0, 0.9], [-3.0, 2.0, 5.0], 0.0)
    for temperature in (0, 0.0, 1e-12):
        x = head.sample(torch.zeros(50, 1), temperature=temperature, generator=generator(0))
        torch.testing.assert_close(x, torch.full((50, 1), 2.0), atol=1e-4, rtol=0)


def test_a_component_of_no_weight_is_never_drawn() -> None:
    head = placed([-1e9, 0.0, -1e9, 0.0, -1e9], [-1000.0, 0.0, 1000.0, 0.0, 2000.0], 0.0)
    assert head.sample(torch.zeros(20_000, 1), generator=generator(0)).abs().max() < 100


def test_a_new_head_has_components_that_differ() -> None:
    torch.manual_seed(0)
    log_weights, means, stds = MixtureHead(5, 3).parts(torch.zeros(5))
    torch.testing.assert_close(log_weights, torch.full((8,), -math.log(8)))
    torch.testing.assert_close(stds, torch.full((8, 3), 1.05))
    assert torch.cdist(means, means)[~torch.eye(8, dtype=torch.bool)].min() > 0.1


def test_two_peaks_are_better_told_by_two_components() -> None:
    torch.manual_seed(0)
    sign = torch.randint(0, 2, (1000, 1)) * 2 - 1
    target = 2 * sign + 0.2 * torch.randn(1000, 1)
    context = torch.zeros(1000, 1)
    final = {}
    for name, head in (("gaussian", GaussianHead(1, 1)), ("mixture", MixtureHead(1, 1, components=4))):
        optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
        for _ in range(250):
            optimiser.zero_grad()
            head.loss(context, target).mean().backward()
            optimiser.step()
        final[name] = float(head.loss(context, target).mean().detach())
    entropy = math.log(2) + math.log(0.2 * math.sqrt(2 * math.pi * math.e))
    assert final["gaussian"] > entropy + 1
    assert final["mixture"] == pytest.approx(entropy, abs=0.08)
