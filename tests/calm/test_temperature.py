"""The exact sampler has the right distribution, and takes the formula's draws; batch weights are unbiased."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickmerge.calm.temperature import batch, batch_weights, exact, expected_draws, split_inverse
from quickmerge.errors import QuickmergeError

P = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)


def sampler_of(rows: Tensor, seed: int = 0) -> Callable[[int], Tensor]:
    """Chunks of two tokens, from probabilities ``(B, V)`` of their values."""
    draw = torch.Generator().manual_seed(seed)

    def sample(count: int) -> Tensor:
        value = torch.multinomial(rows, count, replacement=True, generator=draw).T
        return torch.stack([value, 7 - value], -1)

    return sample


def sharpened(temperature: float) -> Tensor:
    powers = P ** (1 / temperature)
    return powers / powers.sum()


@pytest.mark.parametrize("temperature", [1.0, 0.9, 0.7, 0.5, 0.4, 1 / 3])
def test_the_distribution_and_the_draws_are_those_of_the_formulas(temperature: float) -> None:
    rows = 12_000
    generator = torch.Generator().manual_seed(1)
    found = exact(sampler_of(P.expand(rows, 4)), temperature, generator=generator)
    assert (found.chunks.sum(-1) == 7).all() and found.exact.all()
    counts, wanted = found.chunks[:, 0].bincount(minlength=4), rows * sharpened(temperature)
    chi_square = float(((counts - wanted) ** 2 / wanted).sum())
    assert chi_square < 21.1, "three degrees of freedom: one in 10,000 is above"
    draws = found.draws.double()
    assert abs(float(draws.mean()) - expected_draws(P, temperature)) <= 5 * float(draws.std()) / rows**0.5
    assert found.draws.max() <= found.made


@pytest.mark.parametrize(("temperature", "wanted"), [(0.5, 5.80), (0.7, 5.07), (1 / 3, 20.7), (0.9, 4.99), (1.0, 1.0)])
def test_expected_draws_without_an_early_end(temperature: float, wanted: float) -> None:
    assert expected_draws(P, temperature, early=False) == pytest.approx(wanted, rel=2e-3)


def test_an_early_end_saves_draws_only_where_three_or_more_must_agree() -> None:
    assert expected_draws(P, 0.5) == pytest.approx(expected_draws(P, 0.5, early=False))
    assert expected_draws(P, 1 / 3) == pytest.approx((2 + 0.345) / 0.14500, rel=1e-4)


def test_each_row_has_its_own_distribution() -> None:
    rows = torch.tensor([[0.7, 0.3, 0, 0], [0, 0, 0.5, 0.5], [1.0, 0, 0, 0]])
    found = exact(sampler_of(rows.repeat(4000, 1)), 0.5, generator=torch.Generator().manual_seed(2)).chunks[:, 0]
    first, second, third = (found[at::3] for at in range(3))
    share = 0.49 / 0.58
    assert abs(float((first == 0).double().mean()) - share) < 5 * (share * (1 - share) / 4000) ** 0.5
    assert abs(float((second == 2).double().mean()) - 0.5) < 5 * 0.5 / 4000**0.5 and (third == 0).all()


@pytest.mark.parametrize("block", [1, 3, 256])
def test_where_blocks_end_changes_nothing(block: int, monkeypatch) -> None:
    """The algorithm reads a row's draws in order, however many come at a time."""
    monkeypatch.setattr("quickmerge.calm.temperature.BLOCK", block)
    stream = torch.multinomial(P.expand(50, 4), 3000, replacement=True, generator=torch.Generator().manual_seed(3)).T
    at = 0

    def sample(count: int) -> Tensor:
        nonlocal at
        at += count
        return stream[at - count : at, :, None]

    found = exact(sample, 0.25)
    for row in range(50):
        column, start = stream[:, row].tolist(), 0
        while len(set(column[start : start + 4])) > 1:
            start += next(i for i in range(1, 4) if column[start + i] != column[start]) + 1
        assert int(found.draws[row]) == start + 4 and int(found.chunks[row, 0]) == column[start]


def test_a_row_that_takes_too_many_draws_is_told_or_marked() -> None:
    rows = torch.cat([torch.full((1, 1000), 1e-3), torch.eye(1000)[:1]])
    with pytest.raises(QuickmergeError, match=r"temperature 0\.1 needs more than 500 draws for 1 of 2 rows"):
        exact(sampler_of(rows), 0.1, most_draws=500)
    found = exact(sampler_of(rows), 0.1, most_draws=500, give_up=True)
    assert found.exact.tolist() == [False, True] and found.made == 500 and found.chunks.shape == (2, 2)


def test_batch_weights_are_unbiased_and_never_overflow() -> None:
    """E C(c, n) = C(N, n) P^n for c of N draws: exactly, by the binomial distribution."""
    for total, n, p in ((10, 3, 0.3), (200, 2, 0.05), (200, 50, 0.9)):
        c = torch.arange(total + 1)
        ways = torch.lgamma(torch.tensor(total + 1.0).double()) - torch.lgamma(c + 1.0).double()
        log = ways - torch.lgamma(total - c + 1.0).double() + c * math.log(p) + (total - c) * math.log1p(-p)
        mean = (
            (log + batch_weights(c, n)).exp().sum() if total < 100 else (log + batch_weights(c, n)).logsumexp(0).exp()
        )
        assert float(mean) == pytest.approx(math.comb(total, n) * p**n, rel=1e-3)
    assert torch.isfinite(batch_weights(torch.tensor([10**6]), 5 * 10**5)).all()
    assert batch_weights(torch.tensor([0, 1, 2, 3]), 2).exp().tolist() == pytest.approx([0, 0, 1, 3])


@pytest.mark.parametrize(("count", "top"), [(2, 0.5), (5, 0.638), (20, 0.692), (200, 0.725)])
def test_batch_comes_near_as_draws_grow(count: int, top: float) -> None:
    rows = 6000
    found = batch(sampler_of(P.expand(rows, 4)), 0.5, count, generator=torch.Generator().manual_seed(4))
    share = float((found.chunks[:, 0] == 0).double().mean())
    assert abs(share - top) < 5 * (top * (1 - top) / rows) ** 0.5 + 0.004
    assert found.made == count and not found.exact.any()


def test_batch_takes_fewer_agreements_where_it_has_to() -> None:
    chunks = torch.tensor([[0, 0], [1, 1], [1, 2], [2, 3]])[..., None]  # (4, 2, 1): twice a 1 in the first row alone
    seen = torch.stack(
        [batch(lambda _: chunks, 1 / 3, 4, generator=torch.Generator().manual_seed(s)).chunks for s in range(60)]
    )
    assert (seen[:, 0] == 1).all() and set(seen[:, 1, 0].tolist()) == {0, 1, 2, 3}


def test_batch_at_temperature_one_is_a_draw() -> None:
    found = batch(sampler_of(P.expand(8000, 4)), 1.0, 3, generator=torch.Generator().manual_seed(5))
    wanted = 8000 * P
    assert float(((found.chunks[:, 0].bincount(minlength=4) - wanted) ** 2 / wanted).sum()) < 21.1 and found.exact.all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10_000))
def test_the_inverse_of_a_whole_number_is_whole(n: int) -> None:
    assert split_inverse(1 / n) == (n, 0.0)


@pytest.mark.parametrize("temperature", [0, -1, 1.5, math.nan, math.inf, True, "1"])
def test_a_temperature_outside_is_refused(temperature) -> None:
    with pytest.raises(QuickmergeError, match=r"temperature must be a number in \(0, 1\]"):
        exact(sampler_of(P[None]), temperature)


@pytest.mark.parametrize("temperature", [1e-320, 1e-40, 9e-5])
def test_a_temperature_that_needs_more_draws_than_can_be_made_is_refused(temperature) -> None:
    with pytest.raises(
        QuickmergeError, match=r"temperature must be at least 0.0001 .*: 1 / temperature draws must agree"
    ):
        exact(sampler_of(P[None]), temperature)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: batch(sampler_of(P[None]), 0.7), r"temperature must be 1/n"),
        (lambda: batch(sampler_of(P[None]), 0.5, 0), "count must be a whole number"),
        (lambda: exact(sampler_of(P[None]), 0.5, most_draws=0), "most_draws must be a whole number"),
        (lambda: exact(lambda count: torch.zeros(count, 2), 0.5), r"sampler must give \(2, B, K\) chunks"),
    ],
)
def test_what_does_not_fit_is_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
