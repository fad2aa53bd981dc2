"""What multipole attention accepts, and what it says about the rest."""

from __future__ import annotations

import math
from typing import Any

import pytest

from quickmerge.multipole.settings import Multipole


@pytest.mark.parametrize("name", sorted(Multipole.LEAST))
def test_whole_numbers_have_a_least_value(name: str) -> None:
    least = Multipole.LEAST[name]
    assert getattr(Multipole(**{name: least}), name) == least
    for bad in (least - 1, least + 0.5, True, "8", None):
        with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least {least}, got "):
            Multipole(**{name: bad})


@pytest.mark.parametrize("name", ["ratio", "top_p"])
def test_shares_lie_above_0_and_up_to_1(name: str) -> None:
    for good in (1, 1.0, 1e-9):
        assert getattr(Multipole(**{name: good}), name) == good
    for bad in (0, -0.5, 1.01, math.nan, math.inf, True, "0.5", None):
        with pytest.raises(ValueError, match=f"^{name} must be a number above 0 and up to 1, got "):
            Multipole(**{name: bad})


def test_coarse_clusters_are_fewer_than_fine_ones() -> None:
    assert Multipole(ratio=1 / 8, coarse=1 / 64).coarse == 1 / 64
    for bad in (1 / 8, 0.5):
        with pytest.raises(ValueError, match=f"coarse must be below ratio=0.125, got {bad}"):
            Multipole(ratio=1 / 8, coarse=bad)
    with pytest.raises(ValueError, match="coarse must be a number above 0 and up to 1, got 0"):
        Multipole(coarse=0)


def test_words_are_named_and_near_ones_guessed() -> None:
    with pytest.raises(
        ValueError, match=r"select must be one of budget, top_p, got 'top-p' \(did you mean 'top_p'\?\)"
    ):
        Multipole(select="top-p")
    with pytest.raises(ValueError, match="space must be one of rotated, windowed, got None"):
        Multipole(space=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["replacement", "variance", "update"])
def test_switches_are_true_or_false(name: str) -> None:
    bad: Any
    for bad in (1, "yes", None):
        with pytest.raises(ValueError, match=f"{name} must be True or False, got {bad!r}"):
            Multipole(**{name: bad})


def test_the_label_says_what_is_not_the_default() -> None:
    assert Multipole().label == "multipole"
    assert Multipole(budget=128, space="windowed").label == "multipole:budget=128:space=windowed"


def test_clusters_of_a_block() -> None:
    settings = Multipole(ratio=1 / 16)
    assert [settings.clusters(n) for n in (1, 15, 16, 31, 32, 8192)] == [1, 1, 1, 1, 2, 512]
    assert [Multipole(ratio=1).clusters(n) for n in (1, 7)] == [1, 7]
