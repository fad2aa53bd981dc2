"""Intervals are scipy's, of paired draws; medians have quartiles."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from quickmerge.bench.stats import bootstrap, mean_interval, quartiles, ratio_interval, spread

VALUES = st.lists(st.floats(-100, 100), min_size=2, max_size=12)


def drawn(count: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(count)
    return rng.normal(1, 1, count), rng.uniform(1, 2, count)


@pytest.mark.parametrize("count", [2, 7, 300])
def test_a_ratio_has_the_interval_that_scipy_gives_it(count: int) -> None:
    top, bottom = drawn(count)

    def ratio(a: Any, b: Any, axis: int) -> Any:
        return a.sum(axis) / b.sum(axis)

    found = stats.bootstrap(
        (top, bottom), ratio, n_resamples=500, paired=True, method="percentile", rng=np.random.default_rng(3)
    ).confidence_interval
    assert ratio_interval(top, bottom, resamples=500, seed=3) == pytest.approx((found.low, found.high))


def test_observations_are_drawn_for_all_samples_at_once() -> None:
    top, bottom = drawn(40)
    low, high = ratio_interval(3 * bottom, bottom)
    assert low == pytest.approx(3) == high
    wide = ratio_interval(top, bottom)
    assert wide == ratio_interval(top, bottom) != ratio_interval(top, bottom, seed=1)
    assert wide[0] < top.sum() / bottom.sum() < wide[1]


def test_an_interval_covers_what_it_says_and_narrows() -> None:
    rng = np.random.default_rng(0)
    inside, widths = 0, []
    for count in (20, 80):
        for _ in range(100):
            _, low, high = mean_interval(rng.normal(5, 2, count).tolist(), resamples=300)
            inside += low <= 5 <= high
            widths.append(high - low)
    assert 178 <= inside <= 199
    assert 1.6 < statistics.mean(widths[:100]) / statistics.mean(widths[100:]) < 2.4


def test_draws_that_say_nothing_are_left_out() -> None:
    low, high = ratio_interval([0.0, 8.0], [0.0, 4.0])
    assert low == high == 2 and not math.isnan(low)


def test_several_numbers_of_one_statistic_are_of_the_same_draws() -> None:
    top, _ = drawn(30)

    def two(values: Any, axis: int) -> Any:
        return np.stack([values.mean(axis), values.mean(axis) + 1])

    low, high = bootstrap(two, top)
    assert low[1] - low[0] == pytest.approx(1) == high[1] - high[0]
    one, _ = bootstrap(two, [2.0])
    assert one.tolist() == [2, 3]


@given(VALUES)
def test_quartiles_are_in_order_and_those_of_the_values(values: list[float]) -> None:
    low, middle, high = quartiles(values)
    assert middle == statistics.median(values)
    slack = 1e-9 * max(1, *map(abs, values))
    assert low <= middle + slack and middle <= high + slack
    assert spread("x", values) == {"x": middle, "x_low": low, "x_high": high}
    assert quartiles(values[:1]) == (values[0],) * 3


@pytest.mark.parametrize(
    "call",
    [
        lambda: ratio_interval([], []),
        lambda: ratio_interval([1.0], [1.0, 2.0]),
        lambda: ratio_interval([1.0, 2.0], [1.0, 2.0], resamples=0),
    ],
)
def test_what_can_t_be_drawn_from_is_told(call) -> None:
    with pytest.raises(ValueError, match="must be"):
        call()


def test_wilson_is_the_interval_that_solves_its_equation() -> None:
    """Its ends are the shares p with (h/n - p)^2 = z^2 p (1 - p) / n."""
    from quickmerge.bench.stats import wilson

    for hits, tries in ((0, 5), (3, 7), (12, 12), (1, 100)):
        for end in wilson(hits, tries):
            assert (hits / tries - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / tries, abs=1e-9)
    with pytest.raises(ValueError, match="hits must be from 0 to tries, and tries at least 1, got 0 of 0"):
        wilson(0, 0)
