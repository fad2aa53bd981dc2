"""SCOPE against a literal float64 statement, inside a vision transformer and on features alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import as_masks, make, one_row, prefix_views, ragged
from strategies import assert_same_row, generator, prop, seeds, told
from torch import Tensor

import quickmerge as qm
from quickmerge.merge.reducers import VISION_REDUCERS, VISUAL_TOKEN_REDUCERS, make_reducer
from quickmerge.merge.tokens import Count, Entropy, Evidence, Mass, MergePlan, Ratio, TokenView


def attention_paid(view: TokenView, row: int) -> list[float]:
    """What the prefix tokens, or all where there are none, pay to each token: summed over heads and payers."""
    trace, n = view.evidence.attention[-1], int(view.valid[row].sum())
    guarded = view.protected[row, :n].nonzero().flatten().tolist()
    heads = trace.query.shape[1]
    total = [0.0] * n
    for head in range(heads):
        group = head // (heads // trace.key.shape[1])
        for i in guarded or range(n):
            query = trace.query[row, head, i].double()
            raw = [math.exp(float(query @ trace.key[row, group, j].double()) * trace.scaling) for j in range(n)]
            total = [t + r / math.fsum(raw) for t, r in zip(total, raw, strict=True)]
    return total


def slow_scope(view: TokenView, row: int, count: int, alpha: float, saliency: list[float]) -> list[int]:
    """The tokens that stay, by the paper's loop; how the view pads is on the right."""
    x = view.hidden[row].double()
    fixed = (view.protected & view.valid)[row].nonzero().flatten().tolist()
    free = view.free[row].nonzero().flatten().tolist()

    def similar(i: int, j: int) -> float:
        return max(0.0, float(x[i] @ x[j] / (x[i].norm() * x[j].norm())))

    table = {(i, j): similar(i, j) for i in free for j in free}
    cover, kept = dict.fromkeys(free, 0.0), []
    for _ in range(min(len(free), count - len(fixed))):
        worth = {
            j: math.fsum(max(0.0, table[i, j] - cover[i]) for i in free) * saliency[j] ** alpha
            for j in free
            if j not in kept
        }
        best = max(worth, key=lambda j: worth[j])
        kept.append(best)
        cover = {i: max(cover[i], table[i, best]) for i in free}
    return sorted(fixed + kept)


def stays(plan: MergePlan, row: int) -> list[int]:
    return (plan.slot[row] >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@prop(25)
@given(data=st.data(), seed=seeds)
def test_scope_is_the_papers_loop(alpha: float, data: st.DataObject, seed: int) -> None:
    """By shapes, by masks, and in rows of different lengths with nonsense in the padding."""
    view = data.draw(prefix_views(kinds=("normal",), dtypes=(torch.float64,), max_patches=14))
    count = data.draw(st.integers(1, view.hidden.shape[1] + 2))
    reducer = qm.SCOPE(keep=Count(count), alpha=alpha)
    for seen in (view, as_masks(view), ragged(view, seed)):
        plan = reducer.plan(seen)
        plan.check(seen)
        for row in range(len(view.hidden)):
            fixed, there = int((seen.protected & seen.valid)[row].sum()), int(seen.valid[row].sum())
            n = min(max(count, fixed, 1), there)
            want = slow_scope(seen, row, n, alpha, attention_paid(seen, row))
            assert stays(plan, row) == want and len(want) == n
            assert plan.position[row][plan.valid[row]].tolist() == seen.position[row, want].tolist()


def features(batch: int, tokens: int, seed: int, **more: Any) -> TokenView:
    """What a vision tower hands on: features on a grid, and a saliency that was measured there."""
    draws = generator(seed)
    hidden = torch.randn(batch, tokens, 8, generator=draws, dtype=torch.float64)
    saliency = torch.rand(batch, tokens, generator=draws, dtype=torch.float64)
    return TokenView(hidden, grid=(1, 1, tokens), evidence=Evidence(saliency=saliency), **more)


@prop(30)
@given(st.integers(1, 20), st.integers(1, 22), seeds)
def test_a_saliency_that_the_host_measured(tokens: int, count: int, seed: int) -> None:
    view = features(2, tokens, seed)
    for seen in (view, replace(view, valid=None, protected=None, prefix=0)):
        plan = qm.SCOPE(keep=Count(count)).plan(seen)
        plan.check(seen)
        for row in range(2):
            want = slow_scope(view, row, min(count, tokens), 1.0, view.evidence.saliency[row].tolist())
            assert stays(plan, row) == want


def test_the_hosts_saliency_comes_before_attention() -> None:
    view = make(1, 30, 1, 0)
    own = replace(
        view,
        valid=None,
        protected=None,
        evidence=replace(view.evidence, saliency=(torch.arange(30.0)[None] == 17).float()),
    )
    assert 17 in stays(qm.SCOPE(keep=Count(2)).plan(own), 0)
    assert torch.equal(qm.SCOPE().saliency(own), own.evidence.saliency)


def test_without_alpha_no_saliency_is_read() -> None:
    view = features(2, 20, 0)
    bare = replace(view, evidence=replace(view.evidence, saliency=None))
    reducer = qm.SCOPE(keep=0.5, alpha=0)
    assert reducer.needs.layers == 0 and reducer.needs.rows == 0 and reducer.saliency(bare) is None
    assert torch.equal(reducer.plan(view).slot, reducer.plan(bare).slot)
    assert not torch.equal(qm.SCOPE(keep=0.5).plan(view).slot, reducer.plan(bare).slot)
    assert qm.SCOPE().needs.layers == 1 and qm.SCOPE().needs.rows == 1
    with pytest.raises(ValueError, match=r"attention must hold the trace of the view's block for scope .* got none"):
        qm.SCOPE(keep=0.5).plan(bare)
    with pytest.raises(ValueError, match="budget Mass needs a saliency"):
        qm.SCOPE(keep=Mass(0.5), alpha=0).plan(bare)


@prop(20)
@given(data=st.data(), seed=seeds)
def test_a_batch_of_features_equals_its_rows(data: st.DataObject, seed: int) -> None:
    """Each with a budget of its own, padding on the right with nonsense in it, saliency too."""
    view = features(3, 16, seed)
    lengths = torch.tensor([16, 9, 1])[:, None]
    valid = torch.arange(16) < lengths
    batch = replace(
        view,
        hidden=torch.where(valid[..., None], view.hidden, 1e300),
        valid=valid,
        protected=torch.zeros_like(valid),
        size=valid.long(),
        length=valid.sum(-1),
        evidence=replace(view.evidence, saliency=torch.where(valid, view.evidence.saliency, math.nan)),
    )
    budget = data.draw(st.sampled_from((Ratio(0.4), Count(5), Mass(0.6), Entropy())))
    reducer = qm.SCOPE(keep=budget)
    plan = reducer.plan(batch)
    plan.check(batch)
    for row in range(3):
        n = int(lengths[row])
        one = TokenView(
            view.hidden[row : row + 1, :n], evidence=Evidence(saliency=view.evidence.saliency[row : row + 1, :n])
        )
        assert_same_row(told(plan, batch, row), told(reducer.plan(one), one, 0))


@prop(20)
@given(prefix_views(merged=False), st.integers(1, 30), seeds)
def test_features_of_any_kind_give_lawful_plans(view: TokenView, count: int, seed: int) -> None:
    """Ties, twins, zeros, half precision; whole batches and rows."""
    reducer = qm.SCOPE(keep=Count(count))
    for seen in (view, as_masks(view), ragged(view, seed)):
        plan = reducer.plan(seen)
        plan.check(seen)
        assert plan.valid.sum(-1).tolist() == [min(max(count, view.prefix, 1), n) for n in seen.valid.sum(-1).tolist()]
        assert torch.equal(plan.merge(seen.hidden)[0, : view.prefix], seen.hidden[0, : view.prefix])


def test_zero_features_keep_the_first() -> None:
    view = make(1, 9, 1, 0, kind="zeros")
    assert stays(qm.SCOPE(keep=Count(4)).plan(view), 0) == [0, 1, 2, 3]


def test_everything_is_kept_as_it_is() -> None:
    for view in (features(2, 9, 0), make(2, 9, 1, 0)):
        for keep in (1.0, Count(9), Count(50)):
            plan = qm.SCOPE(keep=keep).plan(view)
            assert plan.is_identity(view) and torch.equal(plan.merge(view.hidden), view.hidden)


def test_duplicates_make_room() -> None:
    """Of many copies one is enough: the rest of the budget goes to what is new."""
    eye = torch.eye(4)
    hidden = torch.cat([eye[:1].expand(20, -1), eye[1:]])[None]
    view = TokenView(hidden, evidence=Evidence(saliency=torch.ones(1, 23)))
    assert stays(qm.SCOPE(keep=Count(4)).plan(view), 0) == [0, 20, 21, 22]


def test_half_precision_chooses_almost_the_same() -> None:
    view = make(2, 200, 1, 3)
    trace = view.evidence.attention[0]
    coarse = replace(
        view,
        valid=None,
        protected=None,
        hidden=view.hidden.bfloat16(),
        evidence=replace(
            view.evidence, attention=(replace(trace, query=trace.query.bfloat16(), key=trace.key.bfloat16()),)
        ),
    )
    one, two = (qm.SCOPE(keep=Count(50)).plan(v).slot >= 0 for v in (view, coarse))
    assert int((one & two).sum()) >= 0.85 * 100


def test_one_row_alone() -> None:
    view = ragged(make(3, 25, 1, 4, dtype=torch.float64), 1)
    plan = qm.SCOPE(keep=0.4).plan(view)
    for row in range(3):
        one = one_row(view, row)
        assert_same_row(told(plan, view, row), told(qm.SCOPE(keep=0.4).plan(one), one, 0))


@pytest.mark.parametrize("alpha", [-0.1, math.nan, math.inf, "1", True])
def test_bad_settings_are_named(alpha: Any) -> None:
    with pytest.raises(ValueError) as error:
        qm.SCOPE(alpha=alpha)
    assert str(error.value) == f"alpha must be a number of at least 0, got {alpha!r}"


@pytest.mark.parametrize(
    ("saliency", "message"),
    [
        (torch.ones(2, 4), r"saliency must have shape \(2, 3\), got \(2, 4\)"),
        (torch.tensor([[1.0, 2, 3], [1, -2, 3]]), "saliency must be finite and not negative, got -2.0"),
        (torch.tensor([[1.0, 2, math.nan], [1, 2, 3]]), "saliency must be finite and not negative, got nan"),
    ],
)
def test_a_bad_saliency_is_named(saliency: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenView(torch.zeros(2, 3, 1), evidence=Evidence(saliency=saliency))


def test_it_has_its_name_and_place() -> None:
    assert VISION_REDUCERS["scope"] is VISUAL_TOKEN_REDUCERS["scope"] is qm.SCOPE
    for place in ("vision", "visual"):
        assert make_reducer("scope:alpha=0.5", place=place, keep=0.2) == qm.SCOPE(keep=0.2, alpha=0.5)
    assert qm.SCOPE(keep=0.2, alpha=0.5).label == "scope:alpha=0.5" and qm.SCOPE(0.3).label == "scope"
    assert qm.SCOPE.once and not qm.SCOPE.proportional
