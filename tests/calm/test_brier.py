"""Brier terms are unbiased against enumerated distributions, in one chunk and along several; BrierLM clamps each."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.calm.brier import (
    along_chunks,
    brier_gap,
    brier_lm,
    brier_score,
    brier_terms,
    colliding_sample,
    collision_shares,
    hit_shares,
)


def slow_terms(samples: list[list[int]], target: list[int]) -> list[float]:
    """The same for one position, pair by pair."""
    count, out = len(samples), []
    for n in range(1, len(target) + 1):
        hits = sum(x[:n] == target[:n] for x in samples) / count
        pairs = list(itertools.combinations(samples, 2))
        out.append(2 * hits - sum(x[:n] == z[:n] for x, z in pairs) / len(pairs))
    return out


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10**6))
def test_terms_equal_counting_pairs(count: int, positions: int, n: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    samples = torch.randint(0, 2, (count, positions, n), generator=draw)
    target = torch.randint(0, 2, (positions, n), generator=draw)
    wanted = [slow_terms(samples[:, p].tolist(), target[p].tolist()) for p in range(positions)]
    torch.testing.assert_close(brier_terms(samples, target), torch.tensor(wanted, dtype=torch.float64))


def test_blocks_give_what_one_piece_gives(monkeypatch) -> None:
    samples, target = torch.randint(0, 2, (5, 7, 3)), torch.randint(0, 2, (7, 3))
    whole = brier_terms(samples, target)
    monkeypatch.setattr("quickmerge.calm.brier.AT_ONCE", 5 * 5 * 3 * 2)
    assert torch.equal(brier_terms(samples, target), whole)


def tree(depth: int, words: int, seed: int) -> dict[tuple[int, ...], torch.Tensor]:
    """A random distribution of the next chunk behind every prefix of chunks."""
    draw = torch.Generator().manual_seed(seed)
    return {
        prefix: torch.softmax(2 * torch.randn(words, generator=draw, dtype=torch.float64), 0)
        for d in range(depth)
        for prefix in itertools.product(range(words), repeat=d)
    }


def test_terms_in_one_chunk_are_unbiased() -> None:
    """Chunks of two tokens out of three: the exact score of each n within five standard errors of the mean."""
    p = tree(1, 9, 3)[()]
    target = torch.tensor([1, 2])
    prefix = p.view(3, 3).sum(1)
    exact = torch.stack([2 * prefix[1] - (prefix**2).sum(), 2 * p[5] - (p**2).sum()])
    draws = torch.multinomial(p, 4 * 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    samples = torch.stack([draws // 3, draws % 3], -1).view(4, 40_000, 2)
    terms = brier_terms(samples, target.expand(40_000, 2))
    error = terms.std(0) / 40_000**0.5
    assert (error > 0).all() and ((terms.mean(0) - exact).abs() < 5 * error).all()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_terms_along_chunks_are_unbiased(count: int) -> None:
    """Three chunks of one token each, behind true prefixes for hits and along one colliding path for collisions."""
    words, many = 3, 30_000
    p, y = tree(3, words, 5), (2, 0, 1)
    draw = torch.Generator().manual_seed(count)
    joint = {x: float(p[()][x[0]] * p[x[:1]][x[1]] * p[x[:2]][x[2]]) for x in itertools.product(range(words), repeat=3)}
    exact = []
    for n in (1, 2, 3):
        marginal: dict[tuple[int, ...], float] = {}
        for x, mass in joint.items():
            marginal[x[:n]] = marginal.get(x[:n], 0) + mass
        exact.append(2 * marginal[y[:n]] - sum(m * m for m in marginal.values()))

    def sample(prefixes: torch.Tensor) -> torch.Tensor:
        rows = torch.stack([p[tuple(row)] for row in prefixes.tolist()])
        return torch.multinomial(rows, count, replacement=True, generator=draw).T[..., None]

    truth = torch.tensor(y).expand(many, 3)
    hits = [hit_shares(sample(truth[:, :c]), truth[:, c : c + 1]) for c in range(3)]
    path, pairs = truth[:, :0], []
    for _ in range(3):
        drawn = sample(path)
        pairs.append(collision_shares(drawn))
        path = torch.cat([path, colliding_sample(drawn, draw)], -1)
    terms = 2 * along_chunks(hits, 3) - along_chunks(pairs, 3)
    error = terms.std(0) / many**0.5
    assert (error > 0).all() and ((terms.mean(0) - torch.tensor(exact)).abs() < 5 * error).all()


def test_the_colliding_value_is_drawn_by_its_pairs() -> None:
    samples = torch.tensor([0, 0, 0, 1, 1, 2])[:, None, None].expand(6, 8000, 1)
    drawn = colliding_sample(samples, torch.Generator().manual_seed(0))[:, 0]
    share = drawn.bincount(minlength=3) / 8000
    assert share[2] == 0 and abs(float(share[0]) - 6 / 8) < 5 * (0.75 * 0.25 / 8000) ** 0.5


def test_parts_of_chunks_of_three_make_four_tokens() -> None:
    first = torch.tensor([[0.5, 0.4, 0.2]], dtype=torch.float64)
    second = torch.tensor([[0.5, 0.1, 0.1]], dtype=torch.float64)
    assert along_chunks([first, second]).tolist() == [[0.5, 0.4, 0.2, 0.1]]


def test_an_even_number_of_negative_terms_scores_nothing() -> None:
    """A head that always says the same wrong thing has four terms of -1, whose product is 1."""
    samples, target = torch.zeros(2, 50, 4, dtype=torch.long), torch.ones(50, 4, dtype=torch.long)
    terms = brier_terms(samples, target)
    assert (terms == -1).all() and brier_lm(terms) == 0
    assert brier_lm(torch.tensor([[-0.5, -0.5, 0.5, 0.5]])) == 0
    assert brier_lm(brier_terms(samples, torch.zeros(50, 4, dtype=torch.long))) == 100


def test_the_interval_holds_the_value_and_is_seeded() -> None:
    random = np.random.default_rng(0)
    terms = 0.2 + 0.3 * random.standard_normal((400, 4))
    score = brier_score(terms)
    assert score.low < score.value < score.high and score == brier_score(terms) != brier_score(terms, seed=1)
    assert score.value == pytest.approx(100 * terms.mean(0).prod() ** 0.25) and (score.positions, score.groups) == (
        400,
        400,
    )
    assert score.as_dict()["terms"] == list(score.terms)


def test_positions_that_are_copies_make_no_narrower_interval() -> None:
    terms = 0.2 + 0.3 * np.random.default_rng(0).standard_normal((40, 4))
    single, copied = brier_score(terms), brier_score(terms.repeat(10, 0), np.arange(40).repeat(10))
    assert (copied.low, copied.high) == pytest.approx((single.low, single.high)) and copied.groups == 40


def test_a_gap_is_paired() -> None:
    terms = 0.2 + 0.3 * np.random.default_rng(0).standard_normal((400, 4))
    gap = brier_gap(terms + 0.01, terms)
    assert 0 < gap.low <= gap.value <= gap.high and gap.high - gap.low < 0.1
    assert brier_gap(terms, terms).high == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: hit_shares(torch.zeros(2, 3, 4), torch.zeros(3, 3)), "samples must have shape"),
        (lambda: collision_shares(torch.zeros(1, 3, 4)), "R of at least 2"),
        (lambda: brier_lm(torch.zeros(3, 3)), "terms must have shape"),
        (lambda: brier_lm(torch.full((3, 4), torch.nan)), "terms must be finite"),
        (lambda: brier_score(torch.zeros(3, 4), [0, 1]), "groups must name one of each of 3"),
        (lambda: brier_score(torch.zeros(3, 4), resamples=0), "resamples must be a whole number"),
        (lambda: brier_gap(torch.zeros(3, 4), torch.zeros(2, 4)), "same positions"),
    ],
)
def test_what_does_not_fit_is_told(call, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
