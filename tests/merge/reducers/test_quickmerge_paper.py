"""QuickMerge++ by its published parts: groups of bounded width, mass weights, entropy saliency, and the presets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hosts_zoo import build, tokens
from hypothesis import given
from hypothesis import strategies as st
from strategies import alone, assert_same_plan, generator, plain_budgets, prop, saliency_budgets, seeds, views

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.calibrate import length_class
from quickmerge.merge.reducers import QuickMerge, QuickMergeVision, make_reducer
from quickmerge.merge.reducers.quickmerge import ALL, FIRST_OF_MEAN, TYPICAL, relative_mass
from quickmerge.merge.tokens import Count, Entropy, TokenView
from quickmerge.merge.tokens.plan import within_width

PAPER = QuickMerge.paper(keep=Count(5), layers=2)
DOUBLE = (torch.float64,)


def slow_anchors(score: dict[int, float], free: list[int], wanted: int, width: int) -> set[int]:
    """Try every number of best tokens, with every width that is allowed, until the count is met."""
    if wanted <= 0 or not free:
        return set()
    best = sorted(free, key=lambda j: (-score[j], j))

    def cut(ends: set[int], wide: int) -> set[int]:
        out, run = set(), 0
        for j in reversed(free):
            run = 0 if j in ends else run + 1
            if run % wide == 0:
                out.add(j)
        return out

    while len(cut({free[-1]}, width)) > wanted:
        width *= 2
    found = [cut({*best[:k], free[-1]}, width) for k in range(len(free) + 1)]
    fits = [anchors for anchors in found if len(anchors) <= wanted]
    return fits[-1]


@prop(150)
@given(views(exempt=True, max_tokens=30), st.integers(1, 40), st.integers(1, 9), seeds)
def test_groups_have_a_bounded_width_and_the_count_is_met(view: TokenView, count: int, width: int, seed: int) -> None:
    score = torch.rand(view.valid.shape, generator=generator(seed)).mul(6).floor()  # with ties
    wanted = Count(count).count(view, None)
    anchor = within_width(view, score, wanted, width)
    shut = view.valid & view.protected
    assert (anchor & ~view.valid).sum() == 0 and (anchor | ~shut).all()
    for row in range(len(view.valid)):
        free = view.free[row].nonzero().flatten().tolist()
        left = int(wanted[row] - shut[row].sum())
        if free and left > 0:
            assert int(anchor[row].sum()) == int(wanted[row])
        told = {j: float(score[row, j]) for j in free}
        assert {j for j in free if anchor[row, j]} == slow_anchors(told, free, left, width)


@prop(60)
@given(
    views(attention=2, dtypes=DOUBLE, kinds=("normal",), max_tokens=12, protect=("none", "ends", "some"), merged=False),
    st.integers(1, 12), st.integers(1, 5),
)  # fmt: skip
def test_the_formula(view: TokenView, count: int, width: int) -> None:
    """Saliency by all voters, runs that end at salient tokens, and members weighed by their saliency, in float64."""
    reducer = replace(PAPER, keep=Count(count), width=width)
    saliency, plan = reducer.saliency(view), reducer.plan(view)
    for row in range(len(view.valid)):
        there = view.valid[row].nonzero().flatten().tolist()
        score = dict.fromkeys(there, 0.0)
        for trace in view.evidence.attention:
            heads = trace.query.shape[1]
            for head in range(heads):
                group = head // (heads // trace.key.shape[1])
                squares = dict.fromkeys(there, 0.0)
                for i in there:
                    seen = [j for j in there if j <= i and (trace.window is None or i - j < trace.window)]
                    dots = [float(trace.query[row, head, i] @ trace.key[row, group, j]) * trace.scaling for j in seen]
                    total = math.fsum(math.exp(d - max(dots)) for d in dots)
                    for j, d in zip(seen, dots, strict=True):
                        p = math.exp(d - max(dots)) / total
                        squares[j] += math.fsum((p * v) ** 2 for v in trace.value[row, group, j].tolist())
                for j in there:
                    score[j] += math.sqrt(squares[j] / len(there)) / heads / len(view.evidence.attention)
        assert {j: float(saliency[row, j]) for j in score} == pytest.approx(score, rel=1e-9, abs=1e-12)
        free = view.free[row].nonzero().flatten().tolist()
        shut = [j for j in there if j not in free]
        exact = {j: float(saliency[row, j]) for j in there}
        ends = slow_anchors(exact, free, min(max(count, len(shut), 1), len(there)) - len(shut), width)
        mass = {j: exact[j] / (max(exact.values()) or 1.0) + 1e-5 for j in there}
        slots: dict[int, list[int]] = {j: [j] for j in [*shut, *ends]}
        for j in free:
            ahead = [a for a in sorted(ends) if a >= j]
            if j not in ends and ahead:
                slots[ahead[0]].append(j)
        assert plan.position[row, plan.valid[row]].tolist() == [int(view.position[row, a]) for a in sorted(slots)]
        merged = plan.merge(view.hidden)[row, plan.valid[row]]
        for place, anchor in enumerate(sorted(slots)):
            total = math.fsum(mass[j] for j in slots[anchor])
            want = sum(view.hidden[row, j].double() * (mass[j] / total) for j in slots[anchor])
            torch.testing.assert_close(merged[place].double(), want, atol=1e-9, rtol=1e-7)


@prop(80)
@given(
    views(attention=2, exempt=True), plain_budgets | saliency_budgets, st.sampled_from(("norm", "entropy", "focus")),
    st.sampled_from((None, 1, 3, 16)),
)  # fmt: skip
def test_its_plans_are_lawful(view: TokenView, keep: Any, measure: str, width: int | None) -> None:
    reducer = QuickMerge.paper(keep=keep, measure=measure, width=width)
    plan = reducer.plan(view)
    plan.check(view)
    member = plan.slot >= 0
    assert (view.position[member] <= plan.position.gather(1, plan.slot.clamp_min(0))[member]).all()
    assert (plan.weight[member] > 0).all()


@prop(30)
@given(views(attention=2, exempt=True), st.integers(1, 30), st.sampled_from(("norm", "focus")))
def test_a_batch_is_its_rows(view: TokenView, count: int, measure: str) -> None:
    reducer = QuickMerge.paper(keep=Count(count), measure=measure, width=4)
    plan = reducer.plan(view)
    for row in range(len(view.valid)):
        own = reducer.plan(alone(view, row))
        assert own.position[0, own.valid[0]].tolist() == plan.position[row, plan.valid[row]].tolist()


@prop(30)
@given(views(attention=2))
def test_as_many_slots_as_tokens_change_nothing(view: TokenView) -> None:
    plan = QuickMerge.paper(keep=Count(99)).plan(view)
    assert torch.equal(plan.valid.sum(-1), view.valid.sum(-1)) and (plan.weight[view.valid] == 1).all()


def test_mass_is_relative_and_never_zero() -> None:
    mass = relative_mass(torch.tensor([[0.0, 2.0, 4.0], [0.0, 0.0, 0.0]]))
    torch.testing.assert_close(mass, torch.tensor([[1e-5, 0.50001, 1.00001], [1e-5, 1e-5, 1e-5]]))


def test_the_preset_and_its_name() -> None:
    paper = QuickMerge.paper(keep=0.4)
    assert paper.keep == Entropy(0.4 * FIRST_OF_MEAN / TYPICAL) and paper.proportional and paper.needs.rows == ALL
    assert paper.needs.spans is None and (paper.width, paper.merge, paper.recency) == (16, "mass", 0.0)
    assert not QuickMerge().proportional and QuickMerge.proportional is False
    assert make_reducer("quickmerge:preset=paper:width=4", keep=0.4) == QuickMerge.paper(keep=0.4, width=4)
    assert make_reducer("quickmerge:preset=paper", place="vision", keep=0.4) == QuickMergeVision.paper(keep=0.4)
    assert make_reducer(paper.label, keep=paper.keep) == paper
    with pytest.raises(QuickmergeError, match="preset must be one of paper for quickmerge, got 'papr'"):
        make_reducer("quickmerge:preset=papr")
    with pytest.raises(QuickmergeError, match="tome takes settings as name=value"):
        make_reducer("tome:preset=paper")
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\]"):
        QuickMerge.paper(keep=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"measure": "norms"}, "measure must be one of norm, entropy, focus, got 'norms' .did you mean 'norm'"),
        ({"width": 0}, "width must be a whole number of at least 1, got 0"),
        ({"proportional": 1}, "proportional must be True or False, got 1"),
        ({"window": "some"}, "window must be a whole number of at least 1, got 'some'"),
        ({"merge": "mas"}, r"merge must be a number in \[0, 1\], got 'mas'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuickMerge(**settings)


@pytest.mark.parametrize("setting", [{"weights": "sizes"}, {"votes": "none"}])
def test_bad_settings_of_the_vision_preset_are_named(setting: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(setting))} must be"):
        QuickMergeVision(**setting)


def test_inside_a_model_a_batch_is_its_rows_and_sizes_count_in_attention() -> None:
    model, ids = build("llama"), tokens(2, 90)
    paper = QuickMerge.paper(keep=Count(30), width=5)
    found = []
    for reducer, rows in ((paper, ids), (paper, ids[:1]), (replace(paper, proportional=False), ids)):
        with torch.no_grad(), qm.reduce(model, reducer, [1, 2], min_tokens=0) as run:
            found.append(model(rows, logits_to_keep=1).logits[:, -1])
            assert run.plans[0].valid.sum(-1).tolist() == [30] * len(rows)
            sizes = run.plans[0].size[run.plans[0].valid]
            assert int(sizes.sum()) == 90 * len(rows)
    torch.testing.assert_close(found[0][:1], found[1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[2])


def test_members_of_a_slot_of_patches_weigh_their_saliency() -> None:
    """With everything alike but the saliency, a slot of two is their mean by it."""
    from quickmerge.merge.reducers import select_visual_tokens

    features, saliency = torch.tensor([[[1.0], [3.0]]]), torch.tensor([[1.0, 3.0]])
    key = torch.ones(1, 2, 2)
    for weights, want in (("size", 2.0), ("mass", (1.0 * (1 / 3) + 3.0) / (1 + 1 / 3))):
        reducer = QuickMergeVision(keep=Count(1), weights=weights, operator="average")
        _, plan = select_visual_tokens(features, reducer, saliency=saliency, key=key)
        assert float(plan.merge(features)[0, 0, 0]) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("given_tokens", "want"), [(1, 64), (64, 64), (65, 128), (1000, 1024), (1024, 1024)])
def test_prompts_are_calibrated_by_classes_of_length(given_tokens: int, want: int) -> None:
    assert length_class(given_tokens) == want


def test_same_plan_as_plain_groups_where_the_width_is_no_limit() -> None:
    model, ids = build("llama"), tokens(1, 80)
    wide = QuickMerge.paper(keep=Count(30), width=ALL)
    with torch.no_grad(), qm.reduce(model, wide, 1, min_tokens=0) as run:
        model(ids)
    with torch.no_grad(), qm.reduce(model, replace(wide, width=80), 1, min_tokens=0) as other:
        model(ids)
    assert_same_plan(run.plan, other.plan)
