"""Where merging begins to pay: what is measured, and what is made of it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from counting_model import counting_model
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop
from torch import Tensor

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.break_even import lengths, time_merge
from quickmerge.merge.run import ObserveRun

MERGE = qm.Merge(qm.Truncate(keep=0.5), layer=2, mode=qm.Prefix(recent=4))


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    return counting_model()


class Clock:
    """Says how long prefills take: merged ones half as long from ``pays`` tokens on, else twice."""

    def __init__(self, pays: float, reads: bool = False) -> None:
        self.pays, self.reads = pays, reads
        self.read: dict[int, list[float]] = {}

    def __call__(self, model: Any, prompt: Tensor, run: AbstractContextManager[Any]) -> float:
        with torch.inference_mode(), run as inside:
            if self.reads:
                model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        tokens = prompt.shape[1]
        if self.reads:
            self.read.setdefault(tokens, []).append(inside.summary().tokens_per_layer[-1])
        if isinstance(run, ObserveRun):
            return 1.0
        return 0.5 if tokens >= self.pays else 2.0


@given(pays=st.integers(1, 400), shortest=st.integers(20, 90), more=st.integers(0, 200))
@prop(12)
def test_it_is_the_shortest_length_that_pays(host: tuple[Any, Any], pays: int, shortest: int, more: int) -> None:
    longest = shortest + more
    found = time_merge(*host, MERGE, shortest=shortest, longest=longest, clock=Clock(pays))
    grid = lengths(shortest, longest)
    assert grid == sorted(set(grid)) and (grid[0], grid[-1]) == (shortest, longest)
    assert found.tokens == next((n for n in grid if n >= pays), None) and found.whole
    assert len(found.points) <= len(grid).bit_length()  # halved in
    assert all(point.pays == (point.tokens >= pays) for point in found.points)


def test_both_ways_read_the_same_prompts_whatever_min_tokens_says(host: tuple[Any, Any]) -> None:
    clock = Clock(1, reads=True)
    late = qm.Merge(MERGE.reducer, layer=2, mode=qm.Prefix(recent=4, min_tokens=10_000))
    found = time_merge(*host, late, shortest=32, longest=64, clock=clock)
    assert set(clock.read) == {point.tokens for point in found.points}
    for tokens, read in clock.read.items():
        assert max(read) == tokens and min(read) < tokens and len(set(read)) == 2, "plain and merged, by turns"
        assert len(read) == 2 * (1 + 3), "a warm-up, and three turns that agree"


def test_time_is_bounded_and_that_is_said(host: tuple[Any, Any]) -> None:
    found = time_merge(*host, MERGE, shortest=32, longest=256, seconds=1e-9, clock=Clock(1))
    assert len(found.points) == 1 and not found.whole and "time was up" in str(found)
    assert found.tokens == found.points[0].tokens  # what is known to pay, though less may


def test_a_real_clock_tells_seconds(host: tuple[Any, Any]) -> None:
    found = time_merge(*host, MERGE, shortest=32, longest=48)
    assert all(0 < p.plain < 60 and 0 < p.merged < 60 and p.low <= p.ratio <= p.high for p in found.points)
    assert found.as_dict()["tokens"] == found.tokens and found.dtype == "float32"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"shortest": 8}, "shortest must be a whole number of at least 9, got 8"),
        ({"longest": 63}, "longest must be a whole number of at least 64, got 63"),
        ({"seconds": 0}, "seconds must be a number above 0, got 0"),
        ({"turns": 2}, "turns must be a whole number of at least 3, got 2"),
    ],
)
def test_limits(host: tuple[Any, Any], more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        time_merge(*host, MERGE, **more)
    with pytest.raises(QuickmergeError, match="break_even is for prefix mode"):
        time_merge(*host, qm.Merge(qm.QuickMerge(keep=0.5), mode=qm.BlockCausal()))
