"""The laws that every reducer for vision transformers obeys, and who votes."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import PREFIXES, as_masks, make, one_row, prefix_views, ragged
from strategies import assert_same_row, prop, seeds, told
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import quickmerge as qm
from quickmerge.errors import UnknownReducerError
from quickmerge.merge.reducers import REDUCERS, VISION_REDUCERS, Attention, Reducer, make_reducer
from quickmerge.merge.reducers.base import key_bias, sees_all, voters
from quickmerge.merge.tokens import AttentionTrace, Count, Entropy, Evidence, Mass, MergePlan, Ratio, TokenView

NAMES = ("quickmerge", "tome", "tofu", "attention", "topnorm", "uniform", "random", "pool", "scope")
LAWFUL = pytest.mark.parametrize("name", NAMES)
MERGES = ("quickmerge", "tome", "tofu", "pool")
MATCHES = ("quickmerge", "tome", "tofu")


def made(name: str, keep: Any, **settings: Any) -> Reducer:
    return make_reducer(name, place="vision", keep=keep, **settings)


def left(name: str, count: int, view: TokenView, row: int = 0) -> int:
    """How many tokens stay of ``count`` that are asked for: those who merge need a slot behind the prefix."""
    there, fixed = int(view.valid[row].sum()), int((view.protected & view.valid)[row].sum())
    low = fixed + (there > fixed) if name in MERGES else max(1, fixed)
    return min(max(count, low), there)


@LAWFUL
@prop(20)
@given(data=st.data())
def test_plans_of_known_shape_are_lawful_and_meet_their_budget(name: str, data: st.DataObject) -> None:
    view = data.draw(prefix_views(layer=data.draw(st.sampled_from((0, 6)))))
    reducer = made(name, Count(data.draw(st.integers(1, view.hidden.shape[1] + 2))))
    plan = reducer.plan(view)
    plan.check(view)
    assert plan.slots == left(name, reducer.budget.tokens, view)
    assert plan.valid.all()
    merged = reducer.combine(view, plan, view.hidden)
    assert merged.shape == (len(view.hidden), plan.slots, view.hidden.shape[2]) and merged.dtype == view.hidden.dtype
    assert torch.equal(merged[:, : view.prefix], view.hidden[:, : view.prefix])
    if name in ("attention", "topnorm", "uniform", "random"):
        assert torch.equal(merged, view.hidden.gather(1, index(plan, view)[..., None].expand_as(merged)))


def index(plan: MergePlan, view: TokenView) -> Tensor:
    """The one member of each slot ``(B, K)``."""
    return torch.stack([torch.stack([(row == k).nonzero()[0, 0] for k in range(plan.slots)]) for row in plan.slot])


@LAWFUL
@prop(20)
@given(data=st.data())
def test_shapes_and_masks_give_the_same_plan(name: str, data: st.DataObject) -> None:
    # With an odd prefix the paper's sets, by position, are not those that masks give, by rank among what is open; and
    # of an odd number of tokens a round takes less than half by the paper, and more by masks.
    prefixes = (0, 2) if name in MATCHES else PREFIXES
    view = data.draw(prefix_views(kinds=("normal",), dtypes=(torch.float64,), prefixes=prefixes))
    n = view.hidden.shape[1]
    reducer = made(name, Count(data.draw(st.integers(n - (n - view.prefix) // 2 if name in MATCHES else 1, n))))
    masks = as_masks(view)
    one, two = reducer.plan(view), reducer.plan(masks)
    two.check(masks)
    for row in range(len(view.hidden)):
        assert_same_row(told(one, view, row), told(two, masks, row))
    torch.testing.assert_close(
        reducer.combine(view, one, view.hidden), reducer.combine(masks, two, view.hidden), rtol=1e-5, atol=1e-5
    )


@LAWFUL
@prop(15)
@given(data=st.data(), seed=seeds)
def test_a_ragged_batch_equals_its_rows(name: str, data: st.DataObject, seed: int) -> None:
    view = ragged(data.draw(prefix_views(kinds=("normal",), dtypes=(torch.float64,))), seed)
    budgets = (Ratio(data.draw(st.floats(0.05, 1))), Count(data.draw(st.integers(1, 20))))
    reducer = made(name, data.draw(st.sampled_from(budgets)))
    plan = reducer.plan(view)
    plan.check(view)
    merged = reducer.combine(view, plan, view.hidden)
    for row in range(len(view.hidden)):
        one = one_row(view, row)
        alone = reducer.plan(one)
        assert_same_row(told(plan, view, row), told(alone, one, 0))
        # slots pad a row where its tokens do
        assert view.pads_left or plan.valid[row].tolist() == [k < alone.slots for k in range(plan.slots)]
        want = reducer.combine(one, alone, one.hidden)[0]
        torch.testing.assert_close(merged[row][plan.valid[row]], want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MATCHES)
def test_rounds_that_even_out_before_they_differ_keep_the_prefix_in_front(name: str) -> None:
    """The first round leaves both rows as long as one another, the second halves one of them alone."""
    view = ragged(make(2, 41, 1, 3), 0)
    view = replace(view, valid=torch.arange(41) < torch.tensor([[41], [21]]))
    reducer = made(name, 0.5)

    class Uneven:
        def count(self, view: TokenView, saliency: Tensor | None) -> Tensor:
            return torch.tensor([11, 21])

    plan = replace(reducer, keep=Uneven()).plan(view)
    plan.check(view)
    assert plan.valid.sum(-1).tolist() == [11, 21] and plan.valid[:, 0].all()
    assert plan.position[:, 0].tolist() == [0, 0]


@LAWFUL
@pytest.mark.parametrize("keep", [1.0, Count(500)])
def test_keeping_everything_is_the_identity(name: str, keep: Any) -> None:
    for merged in (False, True):
        view = make(2, 20, 1, 5, merged=merged)
        plan = made(name, keep).plan(view)
        assert plan.is_identity(view) and torch.equal(plan.merge(view.hidden), view.hidden)
        assert torch.equal(plan.size, view.size)


@LAWFUL
def test_planning_by_shapes_waits_for_nothing(name: str) -> None:
    """No value is looked up, so that nothing waits for a device; for one round and for several."""

    class Looked(TorchDispatchMode):
        def __torch_dispatch__(self, call: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            assert call not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return call(*args, **(kwargs or {}))

    for merged in (False, True):
        for count in (30, 9):
            view, reducer = make(2, 37, 1, 0, merged=merged), made(name, Count(count))
            with Looked():
                plan = reducer.plan(view)
                reducer.combine(view, plan, view.hidden)
            assert plan.seat is not None and torch.equal(view.position.gather(1, plan.seat), plan.position)


@LAWFUL
def test_planning_by_shapes_compiles_whole(name: str) -> None:
    view, reducer = make(2, 37, 1, 0), made(name, Count(9))
    trace = view.evidence.attention[0]

    def run(x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        traces = (AttentionTrace(q, k, v, 0.5),)
        seen = TokenView(
            x, position=position, grid=view.grid, prefix=1, evidence=Evidence(attention=traces, layer=6, depth=12)
        )
        plan = reducer.plan(seen)
        return plan.slot, plan.size, plan.position, reducer.combine(seen, plan, x)

    inputs = (view.hidden, trace.query, trace.key, trace.value, view.position)
    torch._dynamo.reset()
    for got, want in zip(torch.compile(run, fullgraph=True, backend="eager")(*inputs), run(*inputs), strict=True):
        torch.testing.assert_close(got, want)


class Planned(torch.nn.Module):
    """A plan from tensors alone, and what it makes of the tokens."""

    def __init__(self, reducer: Reducer, view: TokenView) -> None:
        super().__init__()
        self.reducer, self.grid = reducer, view.grid

    def forward(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, position: Tensor) -> tuple[Tensor, ...]:
        traces = (AttentionTrace(q, k, v, 0.5),)
        seen = TokenView(
            x, position=position, grid=self.grid, prefix=1, evidence=Evidence(attention=traces, layer=6, depth=12)
        )
        plan = self.reducer.plan(seen)
        return plan.slot, plan.size, plan.position, self.reducer.combine(seen, plan, x)


@LAWFUL
def test_planning_exports_with_any_batch(name: str) -> None:
    """A batch of another size than the example's is planned as it would be without an export."""

    def inputs(rows: int) -> tuple[Tensor, ...]:
        view = make(rows, 37, 1, 0)
        trace = view.evidence.attention[0]
        return view.hidden, trace.query, trace.key, trace.value, view.position

    planned = Planned(made(name, Count(9)), make(3, 37, 1, 0))
    batch = torch.export.Dim("batch", min=1, max=64)
    shapes = {key: {0: batch} for key in ("x", "q", "k", "v", "position")}
    exported = torch.export.export(planned, inputs(3), dynamic_shapes=shapes).module()
    for rows in (1, 2, 7):
        for got, want in zip(exported(*inputs(rows)), planned(*inputs(rows)), strict=True):
            torch.testing.assert_close(got, want)


@LAWFUL
def test_planning_changes_nothing_that_it_reads_and_repeats_itself(name: str) -> None:
    view, reducer = make(2, 37, 1, 0, merged=True), made(name, Count(9))
    trace = view.evidence.attention[0]
    parts = [view.hidden, view.position, view.size, trace.query, trace.key, trace.value]
    before, state = [x.clone() for x in parts], torch.get_rng_state()
    plan = reducer.plan(view)
    merged = reducer.combine(view, plan, view.hidden)
    assert all(torch.equal(x, y) for x, y in zip(parts, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    again = reducer.plan(view)
    assert torch.equal(again.slot, plan.slot)
    assert torch.equal(reducer.combine(view, again, view.hidden), merged)


@LAWFUL
def test_gradients_flow_through_what_is_merged(name: str) -> None:
    view, reducer = make(2, 37, 1, 0), made(name, Count(20))
    x = view.hidden.clone().requires_grad_()
    merged = reducer.combine(view, reducer.plan(replace_hidden(view, x)), x)
    (merged * torch.arange(1.0, 1 + merged.shape[-1])).sum().backward()
    gone = reducer.plan(view).slot < 0
    assert x.grad.isfinite().all()
    assert (x.grad[gone] == 0).all() and (x.grad[~gone].abs().sum(-1) > 0).all()


def replace_hidden(view: TokenView, hidden: Tensor) -> TokenView:
    return replace(view, hidden=hidden, valid=None, protected=None)


@pytest.mark.parametrize("name", ["tome", "tofu", "uniform", "pool"])
@pytest.mark.parametrize("budget", [Entropy(), Mass(0.5)])
def test_reducers_without_a_saliency_refuse_budgets_that_need_one(name: str, budget: Any) -> None:
    with pytest.raises(ValueError, match=f"budget {type(budget).__name__} needs a saliency"):
        made(name, budget).plan(make(1, 9, 1, 0))


@LAWFUL
def test_what_a_reducer_lacks_is_named(name: str) -> None:
    full = make(1, 9, 1, 0)
    bare = TokenView(
        full.hidden, prefix=1, grid=None if name == "pool" else full.grid, evidence=Evidence(layer=6, depth=12)
    )
    reducer = made(name, Count(4))
    if name in (*MATCHES, "attention", "scope"):
        with pytest.raises(ValueError, match=r"attention must hold .* got none"):
            reducer.plan(bare)
    elif name == "pool":
        with pytest.raises(ValueError, match=r"grid must be \(T, H, W\), .* got none"):
            reducer.plan(bare)
    else:
        reducer.plan(bare).check(bare)


def test_reducers_go_by_place_and_name() -> None:
    assert set(VISION_REDUCERS) >= set(NAMES)
    for name, cls in VISION_REDUCERS.items():
        assert cls.name == name and "vision" in cls.places
    for name in NAMES:
        reducer = made(name, 0.3)
        assert isinstance(reducer, VISION_REDUCERS[name]) and reducer.label == name
        assert made(reducer.label, 0.3) == reducer and hash(reducer) == hash(made(name, 0.3))
    assert all("text" in cls.places for cls in REDUCERS.values())
    assert isinstance(made("quickmerge", 0.3), qm.QuickMergeVision)
    assert isinstance(make_reducer("quickmerge", keep=0.3), qm.QuickMerge)
    reducer = made("tofu:switch=3:operator=average:weighted=True", 0.3)
    assert reducer == qm.ToFu(keep=0.3, switch=3, operator="average", weighted=True)
    assert reducer.label == "tofu:switch=3:operator=average:weighted=True"


def test_names_and_places_that_are_not_known() -> None:
    with pytest.raises(UnknownReducerError, match=r"reducer must be one of quickmerge, tome, .* got 'truncate'"):
        made("truncate", 0.5)
    with pytest.raises(UnknownReducerError, match=r"got 'tofo' \(did you mean 'tofu'\?\)"):
        made("tofo", 0.5)
    with pytest.raises(UnknownReducerError, match="got 'tofu'"):
        make_reducer("tofu")
    with pytest.raises(ValueError, match="place must be one of text, vision, visual, got 'video'"):
        make_reducer("tome", place="video")


# Who votes, and what attention sees -------------------------------------------------------------------------------


def slow_voters(view: TokenView, row: int, patches: int) -> list[int]:
    there = view.valid[row].nonzero().flatten().tolist()
    fixed = [i for i in there if view.protected[row, i]]
    free = [i for i in there if i not in fixed]
    most = min(patches, len(free))
    # the middles of as many equal parts
    return fixed + [free[math.floor(Fraction(2 * i + 1, 2) * len(free) / most)] for i in range(most)]


@prop(30)
@given(prefix_views(), st.integers(0, 40), seeds)
def test_voters_are_the_prefix_and_patches_at_equal_distances(view: TokenView, patches: int, seed: int) -> None:
    for seen in (view, as_masks(view), ragged(view, seed)):
        rows = voters(seen, patches)
        for row in range(len(rows)):
            assert [i for i in rows[row].tolist() if i >= 0] == slow_voters(seen, row, patches)
    each = torch.arange(len(view.hidden))
    assert [int((r >= 0).sum()) for r in voters(as_masks(view), each)] == [
        len(slow_voters(view, row, row)) for row in range(len(each))
    ]


def test_known_voters() -> None:
    view = TokenView(torch.zeros(1, 11, 1), prefix=1)
    assert voters(view, 2).tolist() == [[0, 3, 8]] and voters(view, 5).tolist() == [[0, 2, 4, 6, 8, 10]]


def test_the_bias_on_the_keys() -> None:
    view = make(2, 9, 1, 0, merged=True)
    assert key_bias(view, False) is None
    torch.testing.assert_close(key_bias(view, True), view.size.float().log())
    masks = ragged(view, 1)
    for proportional in (False, True):
        bias = key_bias(masks, proportional)
        assert (bias[~masks.valid] == -torch.inf).all()
        want = masks.size.float().log() if proportional else torch.zeros(2, 9)
        torch.testing.assert_close(bias[masks.valid], want[masks.valid])


def test_images_are_told_from_text() -> None:
    hidden = torch.zeros(1, 4, 1)
    assert not sees_all(TokenView(hidden))
    assert sees_all(TokenView(hidden, prefix=0)) and sees_all(TokenView(hidden, grid=(1, 2, 2)))


def slow_received(view: TokenView, row: int, rows: list[int]) -> list[float]:
    """Mean over heads and voters of the attention that each token gets from them, in both directions."""
    trace, there = view.evidence.attention[-1], view.valid[row].nonzero().flatten().tolist()
    heads = trace.query.shape[1]
    out = dict.fromkeys(there, 0.0)
    for head in range(heads):
        group = head // (heads // trace.key.shape[1])
        for i in rows:
            dots = [float(trace.query[row, head, i] @ trace.key[row, group, j]) * trace.scaling for j in there]
            total = math.fsum(math.exp(d) for d in dots)
            for j, d in zip(there, dots, strict=True):
                out[j] += math.exp(d) / total / heads / len(rows)
    return list(out.values())


@prop(15)
@given(prefix_views(dtypes=(torch.float64,), max_patches=8), seeds)
def test_attention_keeps_what_the_prefix_looks_at(view: TokenView, seed: int) -> None:
    """And what all tokens look at, where there is no prefix."""
    for seen in (view, as_masks(view), ragged(view, seed)):
        score = Attention().score(seen)
        for row in range(len(view.hidden)):
            there = seen.valid[row]
            rows = list(range(view.prefix)) or there.nonzero().flatten().tolist()
            assert score[row][there].tolist() == pytest.approx(slow_received(seen, row, rows), rel=0, abs=1e-10)


def test_random_draws_by_position_alone() -> None:
    """The same tokens stay whatever they hold, and the draw is the one that masks give."""
    one, two = make(2, 30, 1, 0), make(2, 30, 1, 1)
    plans = [made("random", Count(10), seed=7).plan(view) for view in (one, two, as_masks(one))]
    assert plans[0].position.tolist() == plans[1].position.tolist() == plans[2].position.tolist()
    assert torch.equal(plans[0].position[0], plans[0].position[1])
    other = made("random", Count(10), seed=8).plan(one)
    assert other.position.tolist() != plans[0].position.tolist()
