"""The laws that every reducer obeys, whatever it keeps, and what they share."""

from __future__ import annotations

from dataclasses import fields, replace
from fractions import Fraction
from functools import partial
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    after,
    alone,
    assert_same_plan,
    assert_same_row,
    counts,
    padded,
    plain_budgets,
    prop,
    saliency_budgets,
    seeds,
    shares,
    told,
    views,
    without_exempt,
)
from torch import Tensor

from quickmerge.errors import UnknownReducerError, whole_number
from quickmerge.merge.reducers import REDUCERS, QuickMerge, Reducer, ScoreReducer, make_reducer
from quickmerge.merge.reducers.base import mean_attention
from quickmerge.merge.tokens import (
    AttentionTrace,
    Count,
    Entropy,
    Evidence,
    Mass,
    MergePlan,
    Ratio,
    Remaining,
    TokenView,
    attention_norm,
    received_attention,
)

NAMES = tuple(REDUCERS)
LAWFUL = pytest.mark.parametrize("name", NAMES)
ONE_SIDED = ("left", "right", "none")


def probing(name: str, layers: int = 2) -> dict[str, Any]:
    """Settings that make a reducer read at most two layers, so that views stay small."""
    return {"layers": layers} if "layers" in {f.name for f in fields(REDUCERS[name])} else {}


def budgets(name: str) -> st.SearchStrategy[Any]:
    """What this reducer may be asked to keep: those without a saliency know no budget that needs one."""
    return plain_budgets if name in ("tome", "uniform") else plain_budgets | saliency_budgets


def saliency(reducer: Reducer, view: TokenView) -> Tensor | None:
    if isinstance(reducer, ScoreReducer):
        return reducer.score(view)
    return reducer.saliency(view) if isinstance(reducer, QuickMerge) else None


def promised(reducer: Reducer, view: TokenView) -> list[int]:
    """How many slots each row must get."""
    exempt = (view.valid & ~view.counted).sum(-1)
    low = (view.protected & view.counted).sum(-1).clamp_min(1)
    high = view.valid.sum(-1) - exempt
    if isinstance(reducer.budget, Ratio):
        exact = [Fraction(reducer.budget.keep) * length + Fraction(1, 10**9) for length in view.counted_length.tolist()]
        wanted = torch.tensor([floor(x + Fraction(1, 2)) for x in exact])
    elif isinstance(reducer.budget, Count):
        wanted = torch.full_like(view.length, reducer.budget.tokens)
    else:
        wanted = reducer.budget.count(view, saliency(reducer, view)) - exempt
    if reducer.name == "tome":
        # ToMe merges and never drops: what is not protected needs at least one slot.
        low = (view.protected & view.counted).sum(-1) + view.free.any(-1)
    return (torch.minimum(torch.maximum(wanted, low), high) + exempt).tolist()


@LAWFUL
@prop(60)
@given(data=st.data())
def test_every_plan_is_lawful_and_meets_its_budget(name: str, data: st.DataObject) -> None:
    view = data.draw(views(attention=2, exempt=data.draw(st.booleans())))
    reducer = make_reducer(name, keep=data.draw(budgets(name)), **probing(name))
    plan = reducer.plan(view)
    plan.check(view)
    assert plan.valid.sum(-1).tolist() == promised(reducer, view)
    for row in range(len(view.valid)):
        for token in (view.protected[row] & view.valid[row]).nonzero().flatten().tolist():
            slot = int(plan.slot[row, token])
            assert int((plan.slot[row] == slot).sum()) == 1
            assert float(plan.weight[row, token]) == 1.0
            assert plan.position[row, slot] == view.position[row, token]
            assert plan.size[row, slot] == view.size[row, token]
        # every slot stands where one of its members stood
        for token, slot in enumerate(plan.slot[row].tolist()):
            members = view.position[row][plan.slot[row] == slot]
            assert slot < 0 or int(plan.position[row, slot]) in members.tolist(), token


@LAWFUL
@prop(40)
@given(data=st.data())
def test_a_batch_equals_its_rows(name: str, data: st.DataObject) -> None:
    view = data.draw(views(attention=2, exempt=data.draw(st.booleans())))
    reducer = make_reducer(name, keep=data.draw(budgets(name)), **probing(name))
    plan = reducer.plan(view)
    for row in range(len(view.valid)):
        one = alone(view, row)
        assert_same_row(told(plan, view, row), told(reducer.plan(one), one, 0))


@LAWFUL
@prop(40)
@given(data=st.data())
def test_exempt_tokens_take_nothing_from_the_others(name: str, data: st.DataObject) -> None:
    """As many of the others are kept as if the exempt tokens had never been there; and all exempt ones."""
    view = data.draw(views(attention=2, exempt=True))
    reducer = make_reducer(name, keep=data.draw(plain_budgets), **probing(name))
    kept = reducer.plan(view).valid.sum(-1)
    for row in range(len(view.valid)):
        exempt = int((view.exempt & view.valid)[row].sum())
        others = int(view.counted[row].sum())
        alone_ = int(reducer.plan(without_exempt(view, row)).valid.sum()) if others else 0
        assert int(kept[row]) == exempt + alone_


@LAWFUL
@prop(30)
@given(data=st.data(), keeps=st.lists(shares, min_size=2, max_size=3))
def test_nor_do_they_over_several_merges(name: str, data: st.DataObject, keeps: list[float]) -> None:
    view = data.draw(views(attention=2, exempt=True, merged=False))
    now, told = (
        view,
        [without_exempt(view, row) if bool(view.counted[row].any()) else None for row in range(len(view.valid))],
    )
    # The last of them goes by what is left, as the later merges of a budget that is no plain share do.
    stages = [*(Ratio(keep) for keep in sorted(keeps, reverse=True)[:-1]), Remaining(min(keeps))]
    for keep in stages:
        reducer = make_reducer(name, keep=keep, **probing(name))
        if reducer.needs.layers:  # traces of the tokens as they are by now
            now = replace(now, evidence=Evidence(attention=traces(now)))
            told = [each and replace(each, evidence=Evidence(attention=traces(each))) for each in told]
        plan = reducer.plan(now)
        rows = [each and reducer.plan(each) for each in told]
        now, told = after(now, plan), [each and after(each, row) for each, row in zip(told, rows, strict=True)]
        for row, each in enumerate(told):
            exempt = int((now.exempt & now.valid)[row].sum())
            assert exempt == int((view.exempt & view.valid)[row].sum())
            assert int(now.counted[row].sum()) == (int(each.valid.sum()) if each else 0)


def traces(view: TokenView) -> tuple[AttentionTrace, ...]:
    x = view.hidden.float()[:, None]
    return (AttentionTrace(x, x, x, 1.0),)


@LAWFUL
@prop(40)
@given(data=st.data(), left=st.integers(0, 5), right=st.integers(0, 5), seed=seeds)
def test_padding_changes_nothing(name: str, data: st.DataObject, left: int, right: int, seed: int) -> None:
    view = data.draw(views(attention=2, exempt=data.draw(st.booleans())))
    reducer = make_reducer(name, keep=data.draw(budgets(name)), **probing(name))
    plan, wider = reducer.plan(view), padded(view, left, right, seed)
    wide = reducer.plan(wider)
    for row in range(len(view.valid)):
        assert_same_row(told(wide, wider, row), told(plan, view, row))


@LAWFUL
@prop(30)
@given(data=st.data())
def test_what_padded_positions_hold_does_not_matter(name: str, data: st.DataObject) -> None:
    view = data.draw(views(attention=2, merged=False))
    reducer = make_reducer(name, keep=data.draw(plain_budgets), **probing(name))
    plan = reducer.plan(view)
    for junk in (-1, -300, 2**20):
        odd = replace(view, position=torch.where(view.valid, view.position, junk))
        other = reducer.plan(odd)
        for row in range(len(view.valid)):
            assert_same_row(told(other, odd, row), told(plan, view, row))


@LAWFUL
@prop(30)
@given(data=st.data(), keep=st.sampled_from((1.0, 1, Ratio(1.0), Count(100))))
def test_keeping_everything_is_the_identity(name: str, data: st.DataObject, keep: Any) -> None:
    # Fresh tokens: of tokens that were reduced before, the whole is more than there are left, so it holds too.
    view = data.draw(views(attention=2))
    plan = make_reducer(name, keep=keep, **probing(name)).plan(view)
    plan.check(view)
    merged = plan.merge(view.hidden)
    for row in range(len(view.valid)):
        there = view.valid[row]
        its = told(plan, view, row)
        assert its.slot == list(range(int(there.sum())))
        assert its.weight.tolist() == [1.0] * len(its.slot)
        assert its.position == view.position[row][there].tolist()
        assert its.size == view.size[row][there].tolist()
        assert torch.equal(merged[row][plan.valid[row]], view.hidden[row][there])
    if bool(view.valid.all()):
        assert plan.is_identity(view)


@LAWFUL
@prop(30)
@given(data=st.data())
def test_planning_is_a_pure_function_of_the_view(name: str, data: st.DataObject) -> None:
    view = data.draw(views(attention=2))
    reducer = make_reducer(name, keep=data.draw(budgets(name)), **probing(name))
    before = [x.clone() for x in tensors(view)]
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = reducer.plan(view)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert_same_plan(reducer.plan(view), first)
    assert_same_plan(replace(reducer).plan(view), first)
    assert all(torch.equal(x, y) for x, y in zip(tensors(view), before, strict=True))


def tensors(view: TokenView) -> list[Tensor]:
    parts = [view.hidden, view.valid, view.protected, view.position, view.size, view.length]
    return parts + [x for t in view.evidence.attention for x in (t.query, t.key, t.value)]


@LAWFUL
@prop(30)
@given(data=st.data())
def test_slots_are_aligned_to_the_side_that_is_not_padded(name: str, data: st.DataObject) -> None:
    view = data.draw(views(attention=2, paddings=ONE_SIDED))
    plan = make_reducer(name, keep=data.draw(plain_budgets), **probing(name)).plan(view)
    index, count = torch.arange(plan.slots), plan.valid.sum(-1)[:, None]
    assert torch.equal(plan.valid, index >= plan.slots - count if view.pads_left else index < count)


@LAWFUL
@prop(30)
@given(data=st.data(), keep=st.tuples(shares, shares))
def test_reducing_twice_is_one_lawful_plan(name: str, data: st.DataObject, keep: tuple[float, float]) -> None:
    """A second reducer acts on the slots of the first, and the two compose to one plan of the original tokens."""
    view = data.draw(views(attention=2, kinds=("normal",), dtypes=(torch.float32,), merged=False))
    high, low = sorted(keep, reverse=True)
    first = make_reducer(name, keep=high, **probing(name)).plan(view)
    between = replace(
        view,
        hidden=first.merge(view.hidden),
        valid=first.valid,
        protected=first.carry(view.protected),
        position=first.position,
        size=first.size,
        evidence=replace(view.evidence, attention=()),
    )
    then = make_reducer("topnorm", keep=low).plan(between)
    then.check(between)
    both = first.compose(then)
    both.check(view)
    assert torch.equal(both.position, then.position) and torch.equal(both.size, then.size)
    torch.testing.assert_close(both.merge(view.hidden), then.merge(between.hidden), rtol=1e-5, atol=1e-5)


@LAWFUL
@prop(30)
@given(data=st.data(), tokens=counts)
def test_more_budget_never_means_fewer_tokens(name: str, data: st.DataObject, tokens: int) -> None:
    view = data.draw(views(attention=2))
    few, more = (make_reducer(name, keep=Count(k), **probing(name)).plan(view) for k in (tokens, tokens + 1))
    assert (few.valid.sum(-1) <= more.valid.sum(-1)).all()


@pytest.mark.parametrize("name", ["tome", "uniform"])
@pytest.mark.parametrize("budget", [Entropy(), Mass(0.5)])
def test_reducers_without_a_saliency_refuse_budgets_that_need_one(name: str, budget: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    trace = AttentionTrace(*(torch.randn(1, 2, 6, 4, generator=rng) for _ in range(3)), scaling=0.5)
    view = TokenView(torch.randn(1, 6, 3, generator=rng), evidence=Evidence(attention=(trace,)))
    with pytest.raises(ValueError, match=f"budget {type(budget).__name__} needs a saliency"):
        make_reducer(name, keep=budget).plan(view)


@LAWFUL
def test_a_reducer_that_reads_attention_says_when_there_is_none(name: str) -> None:
    reducer = make_reducer(name)
    view = TokenView(torch.randn(1, 6, 3, generator=torch.Generator().manual_seed(0)))
    if reducer.needs.layers == 0:
        reducer.plan(view).check(view)
    else:
        with pytest.raises(ValueError, match=r"attention must hold .* got none"):
            reducer.plan(view)


@LAWFUL
@pytest.mark.parametrize("keep", [0, -1, 1.2, float("nan"), None, True], ids=repr)
def test_a_bad_keep_is_refused_at_once(name: str, keep: Any) -> None:
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
        make_reducer(name, keep=keep)


@LAWFUL
def test_settings_are_frozen_and_compare_by_value(name: str) -> None:
    reducer = make_reducer(name, keep=0.3)
    assert reducer == make_reducer(name, keep=0.3) != make_reducer(name, keep=0.4)
    assert hash(reducer) == hash(make_reducer(name, keep=0.3))
    assert reducer.name == name and reducer.budget == Ratio(0.3)
    with pytest.raises(AttributeError):
        reducer.keep = 0.5


@LAWFUL
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "4", None], ids=repr)
def test_counts_among_the_settings_must_be_whole_and_positive(name: str, value: Any) -> None:
    # A setting whose default is None leaves it to the method.
    defaults = {f.name: f.default for f in fields(REDUCERS[name])}
    for setting in {"layers", "window"} & {n for n in defaults if value is not None or defaults[n] is not None}:
        with pytest.raises(ValueError) as error:
            make_reducer(name, **{setting: value})
        # QuickMerge's window may be a share too, and its sentence says so.
        assert str(error.value).startswith(f"{setting} must be a ") and str(error.value).endswith(f", got {value!r}")
        assert "whole number" in str(error.value)


def test_reducers_go_by_their_names() -> None:
    assert set(NAMES) >= {"quickmerge", "attention", "tome", "topnorm", "uniform", "truncate", "random"}
    for name, cls in REDUCERS.items():
        assert isinstance(make_reducer(name), cls) and cls.name == name


@pytest.mark.parametrize(("name", "hint"), [("quickmrge", "did you mean 'quickmerge'?"), ("zzz", "")])
def test_an_unknown_reducer_is_refused_with_the_names_that_are_known(name: str, hint: str) -> None:
    with pytest.raises(UnknownReducerError) as error:
        make_reducer(name)
    assert f"got {name!r}" in str(error.value) and hint in str(error.value)
    assert all(known in str(error.value) for known in NAMES)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_label_is_the_name_and_names_the_reducer(name: str) -> None:
    reducer = make_reducer(name, keep=0.3)
    assert reducer.label == name and make_reducer(reducer.label, keep=0.3) == reducer


def test_settings_may_follow_a_name() -> None:
    reducer = make_reducer("quickmerge:recency=0.5:pool=31", keep=0.3)
    assert reducer == QuickMerge(keep=0.3, recency=0.5, pool=31)
    assert reducer.label == "quickmerge:pool=31:recency=0.5" and make_reducer(reducer.label, keep=0.3) == reducer


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("quickmerge:recncy=0.5", "got 'recncy=0.5' (did you mean 'recency'?)"),
        ("quickmerge:pool", "got 'pool'"),
        ("quickmerge:keep=0.5", "got 'keep=0.5'"),
        ("uniform:pool=3", "uniform takes settings as name=value with a name of (none), got 'pool=3'"),
        ("quickmerge:pool=x", "pool must be a whole number of at least 1, got 'x'"),
        ("quickmerge:merge=1.5", "merge must be a number in [0, 1], got 1.5"),
    ],
)
def test_bad_settings_after_a_name_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make_reducer(name)
    assert message in str(error.value)


def test_whole_number() -> None:
    whole_number("window", 1)
    with pytest.raises(ValueError, match=r"window must be a whole number of at least 1, got 1\.5"):
        whole_number("window", 1.5)


@prop(30)
@given(views(attention=2, dtypes=(torch.float64,), max_tokens=15), st.integers(1, 20), st.booleans())
def test_mean_attention_is_the_mean_over_layers_and_heads(view: TokenView, window: int, norm: bool) -> None:
    measure = partial(attention_norm if norm else received_attention, window=window)
    layers = [measure(t, view.valid, view.position) for t in view.evidence.attention]
    want = torch.stack([layer.sum(1) / layer.shape[1] for layer in layers]).sum(0) / len(layers)
    got = mean_attention(view, measure)
    torch.testing.assert_close(got[view.valid], want[view.valid], rtol=0, atol=1e-12)


class Chosen(ScoreReducer):
    """Keeps by a score that the test gives."""

    name = "chosen"

    def score(self, view: TokenView) -> Tensor:
        return view.hidden[..., 0]


def test_a_reducer_is_a_score_and_nothing_more() -> None:
    view = TokenView(torch.tensor([[[1.0], [5.0], [3.0], [4.0]]]))
    plan = Chosen(keep=0.5).plan(view)
    assert isinstance(plan, MergePlan)
    assert plan.position.tolist() == [[1, 3]] and plan.slot.tolist() == [[-1, 0, -1, 1]]
    assert Chosen().needs.layers == 0 and Chosen.proportional is False


@pytest.mark.parametrize("hook", ["probes", "asks", "voters"])
def test_a_reducer_that_says_what_it_needs_in_the_old_way_is_refused(hook: str) -> None:
    with pytest.raises(TypeError, match=rf"Old\.{hook}.*needs"):
        type("Old", (ScoreReducer,), {hook: 1})
