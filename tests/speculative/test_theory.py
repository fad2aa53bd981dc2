"""The expected number of accepted tokens, and the theorem about where acceptance is best spent."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.speculative import expected_accepted


@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=8))
@prop(60)
def test_it_is_the_mean_of_the_number_that_is_accepted(p: list[float]) -> None:
    mean, path = 0.0, 1.0
    for i, chance in enumerate(p):
        mean += i * path * (1 - chance)
        path *= chance
    assert expected_accepted(p) == pytest.approx(mean + len(p) * path)


def test_the_numbers_that_are_known() -> None:
    assert expected_accepted([0.8, 0.8, 0.8]) == pytest.approx(1.952)
    assert expected_accepted([0.85, 0.8, 0.75]) == pytest.approx(2.04)
    assert expected_accepted([]) == 0


@given(length=st.integers(2, 7), seed=seeds)
@prop(200)
def test_acceptance_is_better_spent_early_where_it_does_not_rise(length: int, seed: int) -> None:
    rng = Random(seed)
    p = sorted((rng.random() for _ in range(length)), reverse=True)
    moved = list(p)
    for _ in range(rng.randint(1, 4)):  # from later to earlier ones, each amount as it comes
        early, late = sorted(rng.sample(range(length), 2))
        most = min(1 - moved[early], moved[late])
        amount = rng.random() * max(0.0, most)
        moved[early] += amount
        moved[late] -= amount
        if sorted(moved, reverse=True) != moved:  # the theorem speaks of the sequence that it starts from
            break
    assert sum(moved) == pytest.approx(sum(p))
    assert expected_accepted(moved) >= expected_accepted(p) - 1e-12


def test_where_it_rises_that_may_be_wrong() -> None:
    assert expected_accepted([0.9, 0.1, 0.9]) == pytest.approx(1.071)
    assert expected_accepted([0.95, 0.05, 0.9]) < expected_accepted([0.9, 0.1, 0.9])


def test_what_is_no_probability_is_told() -> None:
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"p\[1\] must be a probability, 0 to 1, got"):
            expected_accepted([0.5, bad])
