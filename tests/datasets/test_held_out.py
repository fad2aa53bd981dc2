import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.datasets import Passages, overlap

# few different tokens, so that passages are often shared
ids = st.lists(st.integers(0, 2), max_size=24)


def naive_starts(document: list[int], held_out: list[list[int]], n: int) -> list[bool]:
    known = {tuple(other[at : at + n]) for other in held_out for at in range(len(other) - n + 1)}
    return [tuple(document[at : at + n]) in known for at in range(len(document) - n + 1)]


@given(ids, ids, st.integers(1, 6))
def test_overlap_is_that_of_a_plain_loop(one: list[int], other: list[int], n: int) -> None:
    assert overlap(one, other, n) == any(naive_starts(one, [other], n)) == overlap(other, one, n)


@given(ids, st.lists(ids, max_size=4), st.integers(1, 6))
def test_starts_are_those_of_a_plain_loop(document: list[int], held_out: list[list[int]], n: int) -> None:
    assert Passages(held_out, n).starts(document).tolist() == naive_starts(document, held_out, n)


def test_equal_hashes_are_not_taken_for_equal_passages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Passages, "_hash", lambda _, runs: np.zeros(len(runs), np.uint64))
    assert Passages([[1, 2, 3, 4], [5, 6]], 2).starts([9, 9, 2, 3, 5, 6]).tolist() == [False, False, True, False, True]


def test_thirty_two_tokens_by_default() -> None:
    shared = list(range(100, 132))
    assert overlap([1, *shared, 2], [3, *shared, 4])
    assert not overlap([1, *shared[:-1], 2], [3, *shared[:-1], 4])


def test_n_must_be_a_whole_number() -> None:
    with pytest.raises(ValueError, match="n must be a whole number of at least 1"):
        overlap([1], [1], 0)
