from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, shares, views

from quickmerge.merge.reducers import TopNorm
from quickmerge.merge.tokens import Count, Mass, TokenView


@prop(60)
@given(views(dtypes=(torch.float64,)), st.integers(1, 40))
def test_keeps_the_longest_tokens(view: TokenView, tokens: int) -> None:
    plan = TopNorm(keep=Count(tokens)).plan(view)
    for row in range(len(view.valid)):
        length = {
            i: math.sqrt(math.fsum(x * x for x in view.hidden[row, i].tolist()))
            for i in view.valid[row].nonzero().flatten().tolist()
        }
        kept = (plan.slot[row] >= 0).nonzero().flatten().tolist()
        guarded = {i for i in length if view.protected[row, i]}
        dropped = [length[i] for i in length if i not in kept]
        assert guarded <= set(kept)
        assert max(dropped, default=0) <= min((length[i] for i in kept if i not in guarded), default=math.inf) + 1e-12


@prop(80)
@given(views(dtypes=(torch.float64,), protect=("none",), garbage=False), shares)
def test_what_is_lost_is_bounded_by_the_norm_that_is_kept(view: TokenView, keep: float) -> None:
    """``||X - X_kept||_F^2 <= (1 - gamma) ||X||_F^2`` with ``gamma`` the share of the norms that is kept."""
    plan = TopNorm(keep=keep).plan(view)
    x = view.hidden * view.valid[..., None]
    back = plan.unmerge(plan.merge(x))
    for row in range(len(x)):
        norm = x[row].norm(dim=-1)
        if norm.sum() == 0:
            continue
        gamma = norm[plan.slot[row] >= 0].sum() / norm.sum()
        lost = (x[row] - back[row]).square().sum()
        assert float(lost) <= float((1 - gamma) * x[row].square().sum()) + 1e-10


def test_equal_norms_meet_the_bound_and_break_its_squared_form() -> None:
    x = torch.eye(8, dtype=torch.float64)[None]
    plan = TopNorm(keep=0.25).plan(TokenView(x))
    lost = float((x - plan.unmerge(plan.merge(x))).square().sum())
    assert lost == 6.0 == (1 - 0.25) * 8
    assert lost > (1 - 0.25) ** 2 * 8


@prop(40)
@given(views(dtypes=(torch.float64,), protect=("none",), kinds=("normal", "twins")), shares)
def test_a_mass_budget_keeps_that_share_of_the_norms(view: TokenView, mass: float) -> None:
    plan = TopNorm(keep=Mass(mass)).plan(view)
    for row in range(len(view.valid)):
        norm = view.hidden[row][view.valid[row]].norm(dim=-1)
        kept = norm[plan.slot[row][view.valid[row]] >= 0]
        assert float(kept.sum()) >= mass * float(norm.sum()) * (1 - 1e-9)
        assert len(kept) == 1 or float(kept.sum() - kept.min()) < mass * float(norm.sum())
