"""Guesses made of token sequences."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop

from quickmerge.recognition import Guess
from quickmerge.recognition.guess import check_share, ranked


@given(found=st.lists(st.tuples(st.sampled_from(["cat", "dog", "sky", ""]), st.floats(-20, 0)), max_size=12))
@prop(60)
def test_the_same_text_is_summed_and_nothing_is_lost(found: list[tuple[str, float]]) -> None:
    guesses = ranked(found)
    assert {guess.label for guess in guesses} == {label for label, _ in found if label}
    for guess in guesses:
        assert guess.score == pytest.approx(math.fsum(math.exp(p) for label, p in found if label == guess.label))
    assert [guess.score for guess in guesses] == sorted((guess.score for guess in guesses), reverse=True)
    assert ranked(found, 2) == guesses[:2]
    assert ranked(found, minimum=0.1) == [guess for guess in guesses if guess.score >= 0.1]


def test_ties_are_in_the_order_of_their_names() -> None:
    assert ranked([("b", 0.0), ("a", 0.0)]) == [Guess("a", 1.0), Guess("b", 1.0)]


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, True, "0.5"])
def test_a_share_out_of_range_is_told(value: object) -> None:
    with pytest.raises(ValueError, match=r"minimum must be a number in \[0, 1\]"):
        check_share("minimum", value)
