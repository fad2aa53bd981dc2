"""How many tokens every block takes out, against exact fractions."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop

from quickmerge.merge.tokens.removal import Removal, removal_for

depths = st.integers(1, 40)


@prop(60)
@given(st.integers(0, 60), st.integers(-4, 4), depths)
def test_a_straight_line_in_whole_steps(r: int, quarters: int, depth: int) -> None:
    """The running total is never more than half a token from the line's, and none is lost in the end."""
    c = Fraction(quarters, 4)
    got = Removal(r, float(c)).wanted(depth)
    line = [r * (1 - c) + 2 * r * c * at / (depth - 1) if depth > 1 else Fraction(r) for at in range(depth)]
    assert len(got) == depth and all(isinstance(x, int) and x >= 0 for x in got)
    total, exact = 0, Fraction(0)
    for step, wanted in zip(got, line, strict=True):
        total, exact = total + step, exact + wanted
        assert abs(total - exact) <= Fraction(1, 2)
    assert total == r * depth
    assert got[::-1] == Removal(r, float(-c)).wanted(depth) or any((2 * x).denominator == 1 for x in line)


@pytest.mark.parametrize(
    ("removal", "depth", "wanted"),
    [
        (Removal(8), 3, [8, 8, 8]),
        (Removal(13, -1), 12, [26, 24, 21, 19, 16, 14, 12, 10, 7, 5, 2, 0]),
        (Removal(4, 1), 3, [0, 4, 8]),
        (Removal(5, 0.5), 1, [5]),
        (Removal((3, 0, 2)), 5, [3, 0, 2, 0, 0]),
        (Removal([1, 2]), 2, [1, 2]),
        (Removal(()), 2, [0, 0]),
    ],
)
def test_known_schedules(removal: Removal, depth: int, wanted: list[int]) -> None:
    got = removal.wanted(depth)
    assert sum(got) == sum(wanted)
    assert got == wanted or all(abs(a - b) <= 1 for a, b in zip(got, wanted, strict=True))


@prop(60)
@given(st.integers(0, 40), st.integers(1, 300), st.sampled_from((0, 1, 2, 5)), depths)
def test_no_block_takes_more_than_half(r: int, patches: int, prefix: int, depth: int) -> None:
    left = patches + prefix
    for after in Removal(r).counts(patches + prefix, prefix, depth):
        assert after == left - min(r, (left - prefix) // 2)
        left = after
    assert left > prefix


def test_a_vision_transformer_of_small_size_ends_as_it_does_in_the_paper() -> None:
    assert Removal(16).counts(197, 1, 12)[-1] == 11
    assert Removal(13).counts(197, 1, 12)[-1] == 41
    assert Removal(0).counts(197, 1, 12) == [197] * 12


@prop(40)
@given(st.floats(0.55, 1), st.sampled_from((50, 197, 198, 257, 577)), st.sampled_from((0, 1, 5)), st.integers(2, 24))
def test_the_mean_over_blocks_is_the_share_that_was_asked_for(
    keep: float, tokens: int, prefix: int, depth: int
) -> None:
    removal = removal_for(keep, tokens, prefix, depth)
    total = sum(removal.counts(tokens, prefix, depth))
    assert abs(total - keep * tokens * depth) <= depth
    assert max(removal.r) - min(removal.r) <= 1


def test_keeping_all_takes_nothing_and_more_costs_more() -> None:
    assert removal_for(1.0, 197, 1, 12).counts(197, 1, 12) == [197] * 12
    totals = [sum(removal_for(k / 20, 197, 1, 12).counts(197, 1, 12)) for k in range(6, 21)]
    assert totals == sorted(totals)


@pytest.mark.parametrize("r", [-1, 1.5, "8", None, True, (1, -2), (1, 2.0)], ids=repr)
def test_numbers_of_tokens_must_be_whole(r: Any) -> None:
    with pytest.raises(ValueError, match="r must be a whole number of at least 0"):
        Removal(r)


def test_settings_that_do_not_go() -> None:
    for bad in (1.1, -2, math.nan, "1"):
        with pytest.raises(ValueError, match=r"inflection must be a number in \[-1, 1\]"):
            Removal(3, bad)
    with pytest.raises(ValueError, match=r"inflection must be 0 where r is a list, got 0\.5"):
        Removal((1, 2), 0.5)
    with pytest.raises(ValueError, match="r must hold at most 2 numbers, one for each block, got 3"):
        Removal((1, 2, 3)).wanted(2)
    for bad in (0, 1.2, -0.5):
        with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
            removal_for(bad, 197, 1, 12)
    with pytest.raises(ValueError, match=r"keep must be at least 0\.\d+ for 197 tokens, got 0\.01"):
        removal_for(0.01, 197, 1, 12)
