"""A few of many are taken at equal distances."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.sampling import evenly

PLACES = ("start", "middle", "end")


@given(st.integers(0, 200), st.integers(1, 30), st.sampled_from(PLACES))
def test_as_many_as_there_are_at_equal_distances(many: int, most: int, at: str) -> None:
    found = evenly(range(many), most, at=at)  # type: ignore[arg-type]
    assert len(found) == min(many, most) == len(set(found))
    assert found == sorted(found) and all(0 <= index < many for index in found)
    gaps = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert not gaps or max(gaps) - min(gaps) <= 1


@given(st.integers(1, 200), st.integers(1, 30))
def test_each_is_of_its_own_part(many: int, most: int) -> None:
    """Part i of c reaches from i n / c to (i + 1) n / c; items stand at whole numbers, each as wide as 1."""
    count = min(many, most)
    cuts = [Fraction(part * many, count) for part in range(count + 1)]
    start, middle, end = (evenly(range(many), most, at=at) for at in PLACES)  # type: ignore[arg-type]
    assert (start[0], end[-1]) == (0, many - 1)
    for part, (begin, close) in enumerate(itertools.pairwise(cuts)):
        assert start[part] <= begin < start[part] + 1
        assert middle[part] <= (begin + close) / 2 < middle[part] + 1
        assert end[part] < close < end[part] + 2


@pytest.mark.parametrize(("at", "want"), [("start", "adgj"), ("middle", "behk"), ("end", "cfil")])
def test_items_are_given_as_they_are(at: str, want: str) -> None:
    assert evenly("abcdefghijkl", 4, at=at) == list(want)  # type: ignore[arg-type]
    assert evenly("abc", 9, at=at) == ["a", "b", "c"]  # type: ignore[arg-type]
