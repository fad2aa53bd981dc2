from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, views

from quickmerge.merge.reducers import Truncate
from quickmerge.merge.tokens import Count, TokenView


@prop(60)
@given(views(merged=False), st.integers(1, 40), st.integers(0, 6))
def test_keeps_the_first_tokens_and_then_the_most_recent(view: TokenView, tokens: int, sinks: int) -> None:
    plan = Truncate(keep=Count(tokens), sinks=sinks).plan(view)
    for row in range(len(view.valid)):
        n = int(view.valid[row].sum())
        guarded = view.protected[row][view.valid[row]].tolist()
        # protected tokens, then the start from its first token on, then the end from its last token back
        order = [*range(min(sinks, n)), *reversed(range(min(sinks, n), n))]
        order.sort(key=lambda i, g=guarded: not g[i])
        count = min(max(tokens, sum(guarded), 1), n)
        assert plan.position[row][plan.valid[row]].tolist() == sorted(order[:count])


@pytest.mark.parametrize(
    ("sinks", "tokens", "kept"),
    [(2, 5, [0, 1, 7, 8, 9]), (0, 3, [7, 8, 9]), (4, 4, [0, 1, 2, 3]), (4, 5, [0, 1, 2, 3, 9]), (20, 10, [*range(10)])],
)
def test_known_cases(sinks: int, tokens: int, kept: list[int]) -> None:
    plan = Truncate(keep=Count(tokens), sinks=sinks).plan(TokenView(torch.zeros(1, 10, 1)))
    assert plan.position.tolist() == [kept]


def test_a_budget_below_the_sinks_keeps_the_very_first_tokens() -> None:
    plan = Truncate(keep=Count(2), sinks=4).plan(TokenView(torch.zeros(1, 10, 1)))
    assert plan.position.tolist() == [[0, 1]]


@pytest.mark.parametrize("sinks", [-1, 1.0, True, "4", None])
def test_sinks_must_be_a_whole_number(sinks: Any) -> None:
    with pytest.raises(ValueError) as error:
        Truncate(sinks=sinks)
    assert str(error.value) == f"sinks must be a whole number of at least 0, got {sinks!r}"
