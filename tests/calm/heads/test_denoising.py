"""Flow and diffusion heads: network and loss said slowly, exact walks of normal data, and that they learn."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
from heads_cases import batch, normals, slow_linear, small
from hypothesis import given
from strategies import generator, prop, seeds
from torch import Tensor, nn

from quickmerge.calm.heads import DiffusionHead, FlowHead, SamplingHead, make_head
from quickmerge.calm.heads.sampled import TimedNetwork, spread_times, waves

NAMES = ("flow", "diffusion")
both = pytest.mark.parametrize("name", NAMES)


def silu(x: list[float]) -> list[float]:
    return [v / (1 + math.exp(-v)) for v in x]


def moved(x: list[float], shift: list[float], scale: list[float]) -> list[float]:
    mean = math.fsum(x) / len(x)
    size = math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    return [(v - mean) / size * (1 + b) + a for v, a, b in zip(x, shift, scale, strict=True)]


def slow_network(network: TimedNetwork, x: list[float], time: float, context: list[float]) -> list[float]:
    half = network.features // 2
    angles = [time * 1000 * 10 ** (-4 * i / max(1, half - 1)) for i in range(half)]
    told = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
    when = slow_linear(network.read_time[2], silu(slow_linear(network.read_time[0], told)))
    condition = silu([a + b for a, b in zip(when, slow_linear(network.read_context, context), strict=True)])
    state = slow_linear(network.read_vector, x)
    wide = len(state)
    for block in network.blocks:
        m = slow_linear(block.modulation, condition)
        inner = slow_linear(block.down, silu(slow_linear(block.up, moved(state, m[:wide], m[wide : 2 * wide]))))
        state = [s + g * v for s, g, v in zip(state, m[2 * wide :], inner, strict=True)]
    m = slow_linear(network.modulation, condition)
    return slow_linear(network.last, moved(state, m[:wide], m[wide:]))


def slow_pair(name: str, y: float, e: float, t: float) -> tuple[float, float]:
    if name == "flow":
        return (1 - t) * e + t * y, y - e
    a, s = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
    return a * y + s * e, a * e - s * y


@both
@prop(15)
@given(seed=seeds)
def test_loss_is_the_error_of_the_network_said_slowly(name: str, seed: int) -> None:
    rng = Random(seed)
    shape, c, d, n, m = batch(rng), rng.choice((1, 3)), rng.choice((1, 4)), rng.choice((1, 3)), rng.choice((1, 2, 5))
    hidden = rng.choice((5, 6))
    head = small(name, c, d, seed, samples=n, hidden=hidden, blocks=rng.choice((1, 2))).double()
    assert isinstance(head, SamplingHead)
    context = normals((*shape, c), seed)
    target = normals((m, *shape, d), seed + 1) if m > 1 else normals((*shape, d), seed + 1)
    torch.manual_seed(seed)
    got = head.loss(context, target, many_targets=m > 1).flatten().tolist()
    torch.manual_seed(seed)
    noise = torch.randn(n, *shape, d, dtype=torch.float64).view(n, -1, d).tolist()
    times = spread_times(n, torch.Size(shape), torch.float64, torch.device("cpu")).view(n, -1).tolist()
    targets = target.reshape(m, -1, d).tolist()
    for at, row in enumerate(context.reshape(-1, c).tolist()):
        errors = []
        for j in range(n):
            pairs = [slow_pair(name, y, e, times[j][at]) for y, e in zip(targets[j % m][at], noise[j][at], strict=True)]
            said = slow_network(head.network, [x for x, _ in pairs], times[j][at], row)
            errors += [(v - w) ** 2 for v, (_, w) in zip(said, pairs, strict=True)]
        assert got[at] == pytest.approx(math.fsum(errors) / len(errors), rel=1e-7, abs=1e-9)


@prop(20)
@given(seed=seeds)
def test_one_time_for_all_is_that_time_for_each(seed: int) -> None:
    network = TimedNetwork(3, 2, 6, 2).double()
    for weight in network.parameters():
        nn.init.normal_(weight, generator=generator(seed))
    x, context = normals((4, 5, 2), seed), normals((5, 3), seed + 1)
    time = torch.rand((), generator=generator(seed), dtype=torch.float64)
    torch.testing.assert_close(network(x, time, context), network(x, time.expand(4, 5), context))


def test_waves_tell_near_times_apart() -> None:
    times = torch.linspace(0, 1, 1001, dtype=torch.float64)
    told = waves(times, 16)
    assert told.shape == (1001, 16)
    assert (told[1:] - told[:-1]).norm(dim=-1).min() > 0.5


def test_times_are_even_and_uniform() -> None:
    torch.manual_seed(0)
    times = spread_times(4, torch.Size((2000,)), torch.float32, torch.device("cpu"))
    assert times.min() > 0 and times.max() <= 1
    assert torch.equal((times * 4).ceil().long() - 1, torch.arange(4)[:, None].expand(4, 2000))
    assert (times.flatten().sort().values - torch.linspace(0, 1, 8000)).abs().max() < 0.02


class Known(nn.Module):
    """What a network that has learnt normal data of this mean and spread perfectly says."""

    def __init__(self, name: str, mean: float, spread: float) -> None:
        super().__init__()
        self.name, self.mean, self.spread = name, mean, spread
        self.calls = 0

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        self.calls += 1
        t = float(time)
        a, s = (t, 1 - t) if self.name == "flow" else (math.cos(math.pi * t / 2), math.sin(math.pi * t / 2))
        off = (x - a * self.mean) / (a**2 * self.spread**2 + s**2)
        data, noise = self.mean + a * self.spread**2 * off, s * off
        return data - noise if self.name == "flow" else a * noise - s * data


def test_the_flow_of_normal_data_is_a_straight_map() -> None:
    head = FlowHead(1, 1, steps=40)
    head.network = Known("flow", 1.5, 0.4)  # type: ignore[assignment]
    draws = head.draws(torch.zeros(3, 1, dtype=torch.float64), 50, generator(0))
    start = torch.randn(50, 3, 1, generator=generator(0), dtype=torch.float64)
    torch.testing.assert_close(draws, 1.5 + 0.4 * start, atol=2e-3, rtol=0)
    assert head.network.calls == 80


def test_midpoint_steps_gain_two_digits_where_there_are_ten_times_as_many() -> None:
    errors = []
    for steps in (5, 50):
        head = FlowHead(1, 1, steps=steps)
        head.network = Known("flow", 1.5, 0.4)  # type: ignore[assignment]
        start = torch.randn(50, 1, 1, generator=generator(0), dtype=torch.float64)
        draws = head.draws(torch.zeros(1, 1, dtype=torch.float64), 50, generator(0))
        errors.append(float((draws - 1.5 - 0.4 * start).abs().max()))
    assert errors[1] < errors[0] / 50


@pytest.mark.parametrize(("steps", "near"), [(100, 0.05), (800, 0.015)])
def test_diffusion_of_normal_data_has_its_mean_and_in_the_end_its_spread(steps: int, near: float) -> None:
    head = DiffusionHead(1, 1, steps=steps)
    head.network = Known("diffusion", 1.5, 0.4)  # type: ignore[assignment]
    draws = head.draws(torch.zeros(1, 1), 20_000, generator(0))
    assert float(draws.mean()) == pytest.approx(1.5, abs=0.015)
    assert float(draws.std()) == pytest.approx(0.4, rel=near)
    assert head.network.calls == steps
    assert float(torch.stack([draws[:-1, 0, 0], draws[1:, 0, 0]]).corrcoef()[0, 1]) == pytest.approx(0, abs=0.03)


@both
def test_a_new_head_says_zero(name: str) -> None:
    head = make_head(name, 4, 3)
    assert not head.network(
        normals((2, 7, 3), 1, torch.float32), torch.tensor(0.3), normals((7, 4), 2, torch.float32)
    ).any()


@both
def test_a_temperature_is_refused(name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"temperature must be 1 for the {name} head, which has no density.*, got 0\.5"
    ):
        small(name).sample(torch.zeros(2, 4), temperature=0.5)


@both
@pytest.mark.parametrize("count", [0, 1.0, True])
def test_wrong_counts(name: str, count: Any) -> None:
    head = small(name)
    assert isinstance(head, SamplingHead)
    with pytest.raises(ValueError, match="count must be a whole number of at least 1"):
        head.draws(torch.zeros(5, 4), count)


@both
def test_training_learns_a_distribution_that_depends_on_the_context(name: str) -> None:
    """One peak for the one context, two peaks for the other."""
    torch.manual_seed(0)
    head = make_head(name, 2, 1, hidden=32, blocks=2, samples=4, steps={"flow": 20, "diffusion": 40}[name])
    assert isinstance(head, SamplingHead)
    optimiser = torch.optim.Adam(head.parameters(), lr=3e-3)
    losses = []
    for _ in range(500):
        kind = torch.randint(0, 2, (256,))
        context = torch.nn.functional.one_hot(kind, 2).float()
        sign = torch.randint(0, 2, (4, 256)) * 2 - 1
        target = torch.where(kind == 0, 1.0, 1.5 * sign)[..., None] + 0.3 * torch.randn(4, 256, 1)
        optimiser.zero_grad()
        loss = head.loss(context, target, many_targets=True).mean()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])
    with torch.no_grad():
        one, two = head.draws(torch.eye(2), 2000, generator(0))[..., 0].T
    assert float(one.mean()) == pytest.approx(1, abs=0.1)
    assert float(one.std()) == pytest.approx(0.3, abs=0.1)
    assert float(two.mean()) == pytest.approx(0, abs=0.25)
    assert float(two.std()) == pytest.approx(math.hypot(1.5, 0.3), abs=0.2)
    assert float((two.abs() < 0.5).float().mean()) < 0.06
