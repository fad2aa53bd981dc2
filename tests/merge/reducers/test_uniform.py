from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, views

from quickmerge.merge.reducers import Uniform
from quickmerge.merge.tokens import Count, TokenView


@prop(80)
@given(views(), st.integers(1, 40))
def test_keeps_free_tokens_at_an_even_stride(view: TokenView, tokens: int) -> None:
    plan = Uniform(keep=Count(tokens)).plan(view)
    for row in range(len(view.valid)):
        free = view.free[row].nonzero().flatten().tolist()
        count = int(plan.valid[row].sum()) - int((view.protected & view.valid)[row].sum())
        kept = [r for r, i in enumerate(free, 1) if plan.slot[row, i] >= 0]
        # of m free tokens keep those where floor(i c / m) steps up
        assert kept == [r for r in range(1, len(free) + 1) if r * count // len(free) > (r - 1) * count // len(free)]
        assert len(kept) == count
        gaps = [b - a for a, b in zip([0, *kept], kept, strict=False)]
        assert not gaps or max(gaps) - min(gaps) <= 1
        if kept:
            assert kept[-1] == len(free)


@pytest.mark.parametrize(
    ("n", "tokens", "kept"),
    [(10, 5, [1, 3, 5, 7, 9]), (10, 3, [3, 6, 9]), (7, 2, [3, 6]), (5, 5, [0, 1, 2, 3, 4]), (9, 1, [8])],
)
def test_known_cases(n: int, tokens: int, kept: list[int]) -> None:
    assert Uniform(keep=Count(tokens)).plan(TokenView(torch.zeros(1, n, 1))).position.tolist() == [kept]


def test_protected_tokens_do_not_count_in_the_stride() -> None:
    protected = torch.tensor([[True, False, False, True, False, False, False]])
    plan = Uniform(keep=Count(4)).plan(TokenView(torch.zeros(1, 7, 1), protected=protected))
    assert plan.position.tolist() == [[0, 3, 4, 6]]
