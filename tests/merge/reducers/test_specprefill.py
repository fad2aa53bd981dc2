"""SpecPrefill's chunks against their formula, written out in loops."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, views

from quickmerge.merge.reducers import SpecPrefill
from quickmerge.merge.reducers.base import mean_attention
from quickmerge.merge.tokens import TokenView, received_attention


@prop(30)
@given(
    view=views(attention=2, dtypes=(torch.float64,), merged=False, max_tokens=20), window=st.integers(1, 4),
    width=st.sampled_from((1, 3)), chunk=st.integers(1, 6),
)  # fmt: skip
def test_a_token_counts_as_the_mean_of_its_chunk(view: TokenView, window: int, width: int, chunk: int) -> None:
    score = SpecPrefill(layers=2, window=window, pool=width, chunk=chunk).score(view)
    received = mean_attention(view, partial(received_attention, window=window))
    for row in range(len(view.valid)):
        there = view.valid[row].nonzero().flatten().tolist()
        own = [float(received[row, j]) for j in there]
        pooled = [sum(part) / len(part) for part in (own[max(0, j - width // 2) : j + width // 2 + 1]
                                                     for j in range(len(own)))]  # fmt: skip
        for start in range(0, len(there), chunk):
            part = pooled[start : start + chunk]
            for j in there[start : start + chunk]:
                assert float(score[row, j]) == pytest.approx(sum(part) / len(part), abs=1e-9)


@prop(30)
@given(view=views(attention=2, dtypes=(torch.float32,), merged=False), chunk=st.integers(2, 8), keep=st.floats(0.1, 1))
def test_chunks_are_kept_whole_but_for_one(view: TokenView, chunk: int, keep: float) -> None:
    from dataclasses import replace

    bare = replace(view, protected=torch.zeros_like(view.valid), exempt=None)
    plan = SpecPrefill(keep=keep, layers=2, chunk=chunk).plan(bare)
    score = SpecPrefill(layers=2, chunk=chunk).score(bare)
    for row in range(len(view.valid)):
        kept = plan.slot[row][view.valid[row]] >= 0
        parts = [part for part in kept.split(chunk) if 0 < int(part.sum()) < len(part)]
        values = score[row][view.valid[row]].split(chunk)
        if len({float(value[0]) for value in values}) == len(values):  # no two count alike
            assert len(parts) <= 1


@pytest.mark.parametrize("name", ["layers", "window", "pool", "chunk"])
@pytest.mark.parametrize("value", [0, 1.5])
def test_counts_must_be_whole_and_positive(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1, got {value}$"):
        SpecPrefill(**{name: value})


def test_the_pool_must_be_odd() -> None:
    with pytest.raises(ValueError, match=r"^pool must be an odd number, got 2$"):
        SpecPrefill(pool=2)


def test_the_scout_usually_ends_in_the_middle() -> None:
    assert [SpecPrefill().scout(depth) for depth in (30, 4, 1)] == [15, 2, 0]
