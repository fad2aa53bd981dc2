"""GemFilter against its formula, written out in loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, views
from torch import Tensor

from quickmerge.merge.reducers import GemFilter, make_reducer
from quickmerge.merge.tokens import TokenView


def by_hand(view: TokenView, row: int, window: int, width: int, softmax: bool) -> Tensor:
    """The score of every valid token of a row, in float64."""
    trace = view.evidence.attention[0]
    there = view.valid[row].nonzero().flatten().tolist()
    heads, group = trace.query.shape[1], trace.query.shape[1] // trace.key.shape[1]
    total = torch.zeros(len(there), dtype=torch.float64)
    voters = there[-window:]
    for head in range(heads):
        for i in voters:
            query = trace.query[row, head, i].double()
            products = torch.stack([(query * trace.key[row, head // group, j].double()).sum() for j in there])
            products = products * trace.scaling
            if softmax:
                place = view.position[row]
                near = [trace.window is None or int(place[i] - place[j]) < trace.window for j in there]
                seen = torch.tensor([j <= i and close for j, close in zip(there, near, strict=True)])
                products = torch.where(seen, products, -torch.inf).softmax(-1)
            total += products / len(voters) / heads
    half = width // 2
    return torch.stack([total[max(0, j - half) : j + half + 1].mean() for j in range(len(there))])


@prop(30)
@given(
    view=views(attention=1, dtypes=(torch.float64,), merged=False, max_tokens=14), window=st.integers(1, 3),
    width=st.sampled_from((1, 3, 5)), softmax=st.booleans(),
)  # fmt: skip
def test_the_score_is_the_formula_s(view: TokenView, window: int, width: int, softmax: bool) -> None:
    score = GemFilter(window=window, pool=width, softmax=softmax).score(view)
    for row in range(len(view.valid)):
        want = by_hand(view, row, window, width, softmax)
        torch.testing.assert_close(score[row][view.valid[row]], want, rtol=1e-6, atol=1e-8)


def test_the_tokens_that_the_last_one_meets_are_kept() -> None:
    key = torch.zeros(1, 1, 9, 2)
    key[0, 0, [2, 6], 0] = 1.0
    query = torch.zeros(1, 2, 9, 2)
    query[0, :, -1, 0] = 1.0
    from quickmerge.merge.tokens import AttentionTrace, Evidence

    view = TokenView(torch.zeros(1, 9, 1), evidence=Evidence(attention=(AttentionTrace(query, key, key, 1.0),)))
    assert GemFilter(keep=2 / 9, pool=1).plan(view).position.tolist() == [[2, 6]]


@pytest.mark.parametrize(("depth", "block"), [(32, 13), (30, 12), (4, 1), (1, 0)])
def test_the_usual_block_is_the_paper_s_share_of_the_depth(depth: int, block: int) -> None:
    assert GemFilter().scout(depth) == block and GemFilter(block=0).scout(depth) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pool": 4}, "pool must be an odd number, got 4"),
        ({"window": 0}, "window must be a whole number of at least 1, got 0"),
        ({"block": -1}, "block must be a whole number of at least 0, got -1"),
        ({"softmax": 1}, "softmax must be True or False, got 1"),
    ],
)
def test_settings_out_of_range_are_named(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        GemFilter(**given)


def test_settings_may_follow_the_name() -> None:
    assert make_reducer("gemfilter:block=7:softmax=True", keep=0.3) == GemFilter(keep=0.3, block=7, softmax=True)
