"""Rows from pieces against loops, and the shortest cut against all cuts."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.errors import QuickmergeError
from quickmerge.transplant import matching as module
from quickmerge.transplant.matching import Subword, cut

SHARES = {
    "first": lambda n: [1.0] + [0.0] * (n - 1),
    "last": lambda n: [0.0] * (n - 1) + [1.0],
    "mean": lambda n: [1 / n] * n,
    "decay": lambda n: [2.0**-i / (2 - 2.0 ** (1 - n)) for i in range(n)],
}


@prop(30)
@given(seed=seeds, pieces=st.lists(st.lists(st.integers(0, 10), max_size=6), max_size=8),
       weights=st.sampled_from(list(SHARES)), chunk=st.sampled_from((3, 1000)))  # fmt: skip
def test_weighted_means(seed: int, pieces: list[list[int]], weights: str, chunk: int) -> None:
    matrix = torch.randn(11, 4, generator=generator(seed), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        got = Subword(weights).rebuild(pieces, matrix)
    assert got.shape == (len(pieces), 4)
    for row, own in zip(got, pieces, strict=True):
        shares = SHARES[weights](len(own)) if own else []
        want = sum((s * matrix[i] for s, i in zip(shares, own, strict=True)), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(row, want if own else matrix.mean(0))


@prop(20)
@given(seed=seeds, weights=st.sampled_from(Subword.WEIGHTS), share=st.floats(0.01, 1.0))
def test_rows_are_pulled_towards_the_mean(seed: int, weights: str, share: float) -> None:
    matrix = torch.randn(9, 5, generator=generator(seed), dtype=torch.float64)
    pieces = [[0, 3], [8], [2, 2, 5], []]
    whole, pulled = (Subword(weights, one).rebuild(pieces, matrix) for one in (1.0, share))
    torch.testing.assert_close(pulled - matrix.mean(0), share * (whole - matrix.mean(0)))
    for wrong in (0, 1.5, True, "half"):
        with pytest.raises(QuickmergeError, match="share must be a number above 0 and at most 1, got"):
            Subword(weights, wrong)  # type: ignore[arg-type]


def test_one_piece_is_copied_bit_for_bit() -> None:
    matrix = torch.randn(5, 7, generator=generator(0)).bfloat16()
    for weights in Subword.WEIGHTS:
        assert torch.equal(Subword(weights).rebuild([[3], [0]], matrix), matrix[[3, 0]].float())


def all_cuts(data: bytes, ids: dict[bytes, int], whole: bool) -> list[tuple[int, ...]]:
    out = []
    for mask in range(1 << max(0, len(data) - 1)):
        places = [0, *(i + 1 for i in range(len(data) - 1) if mask >> i & 1), len(data)]
        parts = [data[a:b] for a, b in pairwise(places)]
        if all(p in ids for p in parts) and (whole or len(parts) > 1):
            out.append(tuple(ids[p] for p in parts))
    return out


@prop(40)
@given(data=st.text("ab", max_size=7), words=st.sets(st.text("ab", min_size=1, max_size=4), max_size=8),
       whole=st.booleans())  # fmt: skip
def test_the_shortest_cut(data: str, words: set[str], whole: bool) -> None:
    ids = {w.encode(): i for i, w in enumerate(sorted(words))}
    got = cut(data.encode(), ids, whole=whole)
    if not data:
        assert got == ()
        return
    ways = all_cuts(data.encode(), ids, whole)
    lengths = {i: len(w) for w, i in ids.items()}
    best = min(ways, key=lambda way: (len(way), [-lengths[i] for i in way]), default=())
    assert got == best


def test_what_it_refuses() -> None:
    with pytest.raises(QuickmergeError, match="did you mean 'first'"):
        Subword("frist")
    with pytest.raises(QuickmergeError, match="pieces must be of the matrix's 5 rows, got 5"):
        Subword().rebuild([[0, 5]], torch.zeros(5, 2))
