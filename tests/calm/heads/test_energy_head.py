"""The energy head: its network said slowly, its noise, and that it learns a distribution."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from heads_cases import batch, lively, normals, slow_energy, slow_linear
from hypothesis import given
from strategies import generator, prop, seeds

from quickmerge.calm.heads import EnergyHead


def energy(context: int = 4, width: int = 3, seed: int = 0, **settings: Any) -> EnergyHead:
    head = EnergyHead(context, width, **{"noise": 5, "hidden": 6, "samples": 3, **settings})
    lively(head, seed)
    return head


def silu(x: list[float]) -> list[float]:
    return [v / (1 + math.exp(-v)) for v in x]


def norm(layer: Any, x: list[float]) -> list[float]:
    mean = math.fsum(x) / len(x)
    scale = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x) + layer.eps)
    weights = zip(x, layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [(v - mean) / scale * w + b for v, w, b in weights]


def slow_draw(head: EnergyHead, noise: list[float], context: list[float]) -> list[float]:
    x = norm(head.read_noise[1], slow_linear(head.read_noise[0], noise))
    c = norm(head.read_context[1], slow_linear(head.read_context[0], context))
    for block in head.blocks:
        rows: list[list[float]] = block.from_context.weight.tolist()
        read = [math.fsum(w * v for w, v in zip(row, c, strict=True)) for row in rows]
        inner = [a + b for a, b in zip(slow_linear(block.from_noise, norm(block.norm, x)), read, strict=True)]
        both = slow_linear(block.gate, silu(slow_linear(block.middle, silu(inner))))
        half = len(both) // 2
        gated = [a * b for a, b in zip(silu(both[:half]), both[half:], strict=True)]
        x = [a + b for a, b in zip(x, slow_linear(block.down, gated), strict=True)]
    return slow_linear(head.last, silu(slow_linear(head.out[1], norm(head.out[0], x))))


@prop(15)
@given(seed=seeds)
def test_loss_is_the_score_of_the_network_said_slowly(seed: int) -> None:
    rng = Random(seed)
    shape, c, d, n, m = batch(rng), rng.choice((1, 3)), rng.choice((1, 4)), rng.choice((2, 3)), rng.choice((1, 3))
    alpha, many = rng.choice((0.5, 1.0, 1.5)), m > 1
    head = energy(c, d, seed, samples=n, alpha=alpha, blocks=rng.choice((1, 2))).double()
    context = normals((*shape, c), seed)
    target = normals((m, *shape, d), seed + 1) if many else normals((*shape, d), seed + 1)
    torch.manual_seed(seed)
    got = head.loss(context, target, many_targets=many).flatten().tolist()
    torch.manual_seed(seed)
    noise = (torch.rand(n, *shape, 5, dtype=torch.float64) - 0.5).view(n, -1, 5).tolist()
    targets = target.reshape(m, -1, d).tolist()
    for at, row in enumerate(context.reshape(-1, c).tolist()):
        samples = [slow_draw(head, noise[j][at], row) for j in range(n)]
        want = slow_energy(samples, [targets[j][at] for j in range(m)], alpha)
        assert got[at] == pytest.approx(want, rel=1e-7, abs=1e-7)


def test_bfloat16_inputs_stay_near_the_slow_score() -> None:
    head, context = energy(), normals((5, 4), 1, torch.bfloat16)
    target = normals((5, 3), 2, torch.bfloat16)
    torch.manual_seed(3)
    got = head.loss(context, target).tolist()
    torch.manual_seed(3)
    noise = (torch.rand(3, 5, 5) - 0.5).tolist()
    for at in range(5):
        samples = [slow_draw(head, noise[j][at], context[at].tolist()) for j in range(3)]
        assert got[at] == pytest.approx(slow_energy(samples, [target[at].tolist()], 1.0), rel=1e-4, abs=1e-4)


def test_a_new_head_says_zero_and_learns_from_there() -> None:
    head, context = EnergyHead(4, 3), normals((7, 4), 1, torch.float32)
    assert not head.sample(context).any()
    loss = head.loss(context, torch.ones(7, 3))
    torch.testing.assert_close(loss, torch.full((7,), 2 * 3**0.5))
    loss.sum().backward()
    assert head.last.weight.grad is not None and head.last.weight.grad.abs().min() > 0


def test_draws_differ_from_one_another_and_between_positions() -> None:
    head = energy()
    draws = head.draws(normals((4,), 1).expand(6, 4), 5, generator(0)).reshape(30, 3)
    assert torch.cdist(draws, draws)[~torch.eye(30, dtype=torch.bool)].min() > 0


@pytest.mark.parametrize("settings", [{}, {"hidden": 3}])
def test_a_narrow_head_still_has_noise(settings: dict[str, int]) -> None:
    head = EnergyHead(1, 1, **settings)
    lively(head, 0)
    draws = head.draws(torch.zeros(1), 200, generator(0))
    assert len(draws.unique()) > 150


def test_one_draw_is_a_sample_and_the_mean_is_that_of_draws() -> None:
    head, context = energy(), normals((2, 5, 4), 1)
    assert torch.equal(head.sample(context, generator=generator(1)), head.draws(context, 1, generator(1))[0])
    torch.manual_seed(2)
    mean = head.mean(context)
    torch.manual_seed(2)
    assert torch.equal(mean, head.draws(context, 3).mean(0))


def test_a_seed_gives_a_float32_and_a_bfloat16_head_the_same_noise() -> None:
    head, context = energy(), normals((200, 4), 1, torch.float32)
    exact = head.sample(context, generator=generator(1))
    rough = head.bfloat16().sample(context, generator=generator(1))
    assert (exact - rough).abs().mean() < 0.05 * exact.abs().mean()


def test_many_targets_average_their_scores() -> None:
    head, context, target = energy(), normals((5, 4), 1), normals((12, 5, 3), 2)

    def seeded(target: torch.Tensor, many: bool) -> torch.Tensor:
        torch.manual_seed(0)
        return head.loss(context, target, many_targets=many)

    one_by_one = torch.stack([seeded(y, False) for y in target]).mean(0)
    torch.testing.assert_close(seeded(target, True), one_by_one)


def test_a_temperature_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"temperature must be 1 for the energy head, which has no density.*, got 0\.5"
    ):
        energy().sample(torch.zeros(2, 4), temperature=0.5)
    energy().sample(torch.zeros(2, 4), temperature=1)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 3), (2, 5, 2)])
def test_wrong_many_targets(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="target must have shape"):
        energy().loss(torch.zeros(5, 4), torch.zeros(shape), many_targets=True)
    with pytest.raises(ValueError, match=r"target must have shape \(M, 5, 3\) with M of at least 1, got \(0, 5, 3\)"):
        energy().loss(torch.zeros(5, 4), torch.zeros(0, 5, 3), many_targets=True)


@pytest.mark.parametrize("count", [0, 1.0, True])
def test_wrong_counts(count: Any) -> None:
    with pytest.raises(ValueError, match="count must be a whole number of at least 1"):
        energy().draws(torch.zeros(5, 4), count)


def test_training_learns_a_distribution_that_depends_on_the_context() -> None:
    """One peak for the one context, two peaks for the other."""
    torch.manual_seed(0)
    head = EnergyHead(2, 1, noise=8, hidden=24, blocks=1)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    for _ in range(500):
        kind = torch.randint(0, 2, (256,))
        context = torch.nn.functional.one_hot(kind, 2).float()
        sign = torch.randint(0, 2, (256,)) * 2 - 1
        target = torch.where(kind == 0, 1.0, 1.5 * sign)[:, None] + 0.3 * torch.randn(256, 1)
        optimiser.zero_grad()
        head.loss(context, target).mean().backward()
        optimiser.step()
    with torch.no_grad():
        one, two = head.draws(torch.eye(2), 4000, generator(0))[..., 0].T
    assert float(one.mean()) == pytest.approx(1, abs=0.1)
    assert float(one.std()) == pytest.approx(0.3, abs=0.1)
    assert float(two.mean()) == pytest.approx(0, abs=0.2)
    assert float(two.std()) == pytest.approx(math.hypot(1.5, 0.3), abs=0.2)
    assert float((two.abs() < 0.5).float().mean()) < 0.12
