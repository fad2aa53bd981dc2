"""QuickMerge against its formula said slowly in float64; the only place that states it."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import assert_same_plan, generator, plain_budgets, prop, saliency_budgets, views

from quickmerge.merge.reducers import QuickMerge
from quickmerge.merge.tokens import AttentionTrace, Count, Entropy, Evidence, MergePlan, TokenView


def slow_saliency(view: TokenView, row: int, window: int, nearest: int, pool: int) -> dict[int, float]:
    """``mean over the pool of mean over layers and heads of sqrt(mean over voters far enough of ||p_ij v_j||^2)``.

    And then the largest of these in a token's span, where spans are known.
    """
    tokens = view.valid[row].nonzero().flatten().tolist()
    nearest = min(nearest, int(view.length[row]) // 8)
    voters = tokens[-window:]
    score = dict.fromkeys(tokens, 0.0)
    for trace in view.evidence.attention:
        heads = trace.query.shape[1]
        for head in range(heads):
            group = head // (heads // trace.key.shape[1])
            squares = dict.fromkeys(tokens, 0.0)
            for i in voters:
                seen = [
                    j
                    for j in tokens
                    if j <= i and (trace.window is None or view.position[row, i] - view.position[row, j] < trace.window)
                ]
                dots = [float(trace.query[row, head, i] @ trace.key[row, group, j]) * trace.scaling for j in seen]
                total = math.fsum(math.exp(d - max(dots)) for d in dots)
                for j, d in zip(seen, dots, strict=True):
                    if view.position[row, i] - view.position[row, j] < nearest:
                        continue
                    p = math.exp(d - max(dots)) / total
                    squares[j] += math.fsum((p * v) ** 2 for v in trace.value[row, group, j].tolist())
            for j in tokens:
                score[j] += math.sqrt(squares[j] / len(voters)) / heads / len(view.evidence.attention)
    near = {j: [score[i] for i in tokens if abs(i - j) <= pool // 2] for j in tokens}
    pooled = {j: math.fsum(near[j]) / len(near[j]) for j in tokens}
    if view.group is None:
        return pooled
    return {j: max(pooled[i] for i in tokens if view.group[row, i] == view.group[row, j]) for j in tokens}


small = views(attention=2, dtypes=(torch.float64,), kinds=("normal",), max_tokens=12, protect=("none", "ends", "some"))


@prop(60)
@given(
    small,
    st.integers(1, 14),
    st.integers(0, 6),
    st.integers(1, 20),
    st.sampled_from((1, 1, 3, 5)),
    st.integers(1, 6),
    st.sampled_from((0, 0.25, 0.5, 0.75, 1)),
    st.sampled_from((0.1, 0.3, 1.0, 0.0)),
    st.none() | st.integers(0, 10**6),
)
def test_the_formula(
    view: TokenView,
    window: int,
    nearest: int,
    spread: int,
    pool: int,
    tokens: int,
    recency: float,
    merge: float,
    cuts: int | None,
) -> None:
    if cuts is not None:
        begins = torch.rand(view.valid.shape, generator=generator(cuts)) < 0.4
        view = replace(view, group=begins.long().cumsum(-1))
    # Original positions further apart than the tokens are, as after an earlier merge.
    position = view.position * spread
    view = replace(view, position=position, length=position.amax(-1) + spread)
    reducer = QuickMerge(
        keep=Count(tokens), layers=2, window=window, nearest=nearest, pool=pool, recency=recency, merge=merge
    )
    saliency, plan = reducer.saliency(view), reducer.plan(view)
    for row in range(len(view.valid)):
        slow = slow_saliency(view, row, window, nearest, pool)
        assert {j: float(saliency[row, j]) for j in slow} == pytest.approx(slow, rel=1e-10, abs=1e-10)
        # Pools of the same tokens are equal on both sides, and so are tokens without votes; other scores must not be
        # closer than rounding.
        distinct = sorted(set(slow.values()))
        assume(all(b - a > 1e-9 for a, b in pairwise(distinct)))

        guarded = [j for j in slow if view.protected[row, j]]
        count = min(max(tokens, len(guarded), 1), len(slow))
        recent = sorted(slow)[len(slow) - int(Fraction(recency) * count) :]
        ranked = sorted(
            slow, key=lambda j, s=slow, g=guarded, r=recent: (j not in g, j not in r, -j if j in r else -s[j], j)
        )
        kept = sorted(ranked[:count])
        leader: dict[int, int | None] = {}
        for j in slow:
            ahead = [a for a in kept if a > j and a not in guarded]
            leader[j] = j if j in kept else ahead[0] if ahead and merge > 0 else None
        share = {j: 1.0 if j in kept else merge for j in slow}
        assert plan.position[row][plan.valid[row]].tolist() == [int(view.position[row, a]) for a in kept]
        first = int(plan.valid[row].long().argmax())
        for j in slow:
            if leader[j] is None:
                assert int(plan.slot[row, j]) == -1
                continue
            assert int(plan.slot[row, j]) - first == kept.index(leader[j])
            total = math.fsum(share[i] for i in slow if leader[i] == leader[j])
            assert float(plan.weight[row, j]) == pytest.approx(share[j] / total, rel=1e-6)


def kept(plan: MergePlan, view: TokenView, row: int) -> set[int]:
    """The tokens of a row that lead a slot."""
    places = set(plan.position[row][plan.valid[row]].tolist())
    return {j for j in view.valid[row].nonzero().flatten().tolist() if int(view.position[row, j]) in places}


@prop(120)
@given(
    views(attention=1, exempt=True), plain_budgets | saliency_budgets, st.sampled_from((0.0, 0.3, 0.5, 0.85, 0.99, 1.0))
)
def test_of_tokens_kept_for_being_recent_the_newest_win(view: TokenView, keep: Any, recency: float) -> None:
    """However many tokens are protected, and wherever: a recent token goes only where all older free ones do."""
    plan = QuickMerge(keep=keep, layers=1, recency=recency).plan(view)
    for row in range(len(view.valid)):
        counted = view.counted[row].nonzero().flatten().tolist()
        free = set(view.free[row].nonzero().flatten().tolist())
        stay = kept(plan, view, row)
        share = Fraction(recency) * (len(stay) - int((view.valid & ~view.counted)[row].sum()))
        recent = counted[len(counted) - int(share) :]
        lost = [j for j in recent if j not in stay]
        assert not lost or not [j for j in stay & free if j < max(lost)]


@prop(40)
@given(views(attention=1, exempt=True), plain_budgets)
def test_nothing_is_kept_for_being_recent_where_text_follows(view: TokenView, keep: Any) -> None:
    inside = replace(view, latest=False)
    plain = QuickMerge(keep=keep, layers=1, window=64, recency=0.0, pool=1, merge=0)
    want = plain.plan(view)
    assert_same_plan(replace(plain, recency=0.9).plan(inside), want)
    # Nobody knows a question there, so that as many vote as ever may, and each token stands for itself.
    assert_same_plan(QuickMerge(keep=keep, layers=1).plan(inside), want)
    # What is asked for is done there too.
    wide = replace(plain, pool=15, merge=0.1)
    assert_same_plan(wide.plan(inside), wide.plan(view))


@prop(40)
@given(views(attention=2), st.integers(1, 40), st.sampled_from((0.1, 1.0)))
def test_a_slot_holds_nothing_later_than_its_position(view: TokenView, tokens: int, merge: float) -> None:
    plan = QuickMerge(keep=Count(tokens), layers=2, merge=merge).plan(view)
    member = plan.slot >= 0
    assert (view.position[member] <= plan.position.gather(1, plan.slot.clamp_min(0))[member]).all()


@prop(30)
@given(views(attention=2), st.integers(1, 40))
def test_merge_0_prunes_the_same_tokens(view: TokenView, tokens: int) -> None:
    """Whether the rest merges or is dropped does not change what is kept."""
    pruned, merged = (QuickMerge(keep=Count(tokens), layers=2, merge=m).plan(view) for m in (0, 0.3))
    assert torch.equal(pruned.position, merged.position) and torch.equal(pruned.valid, merged.valid)
    assert torch.equal(
        pruned.size,
        torch.zeros_like(pruned.size).scatter_add(1, pruned.slot.clamp_min(0), view.size * (pruned.slot >= 0)),
    )
    assert ((pruned.slot >= 0).sum(-1) == pruned.valid.sum(-1)).all()
    assert ((pruned.weight == 1) == (pruned.slot >= 0)).all()


def test_an_entropy_budget_reads_the_saliency() -> None:
    """Values that are evenly large keep more of a row than a single large one."""
    n = 12
    zeros, one = torch.zeros(2, 1, n, 2), torch.ones(2, 1, n, 2)
    one[1, 0, 1:] = 1e-6
    view = TokenView(torch.zeros(2, n, 1), evidence=Evidence(attention=(AttentionTrace(zeros, zeros, one, 1.0),)))
    reducer = QuickMerge(keep=Entropy(), layers=1, nearest=0, pool=1)
    even, peaked = reducer.plan(view).valid.sum(-1).tolist()
    assert even > n / 2 and peaked == 1


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("pool", 4, "must be odd"),
        ("pool", 0, "must be a whole number of at least 1"),
        ("merge", -0.1, r"must be a number in \[0, 1\]"),
        ("merge", 1.5, r"must be a number in \[0, 1\]"),
        ("merge", "0.1", r"must be a number in \[0, 1\]"),
        ("recency", 1.1, r"must be a number in \[0, 1\]"),
        ("window", 0.5, "must be a whole number of at least 1"),
        ("nearest", -1, "must be a whole number of at least 0"),
        ("spans", "lines", "must be one of auto, line, word, none"),
    ],
)
def test_bad_settings_are_named(setting: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{setting} {allowed}, got {value!r}( .did you mean 'line'..)?$"):
        QuickMerge(**{setting: value})


def test_probes_as_many_layers_as_it_is_told() -> None:
    assert QuickMerge(layers=3).needs.layers == 3


@pytest.mark.parametrize(("tokens", "rows"), [(30, 30), (64, 64), (5000, 64)])
def test_voters_are_the_window_or_the_whole_prompt(tokens: int, rows: int) -> None:
    assert min(QuickMerge(window=64).needs.rows, tokens) == rows
    assert QuickMerge().needs.rows == 16


@prop(40)
@given(views(attention=1), st.integers(0, 10**6), st.integers(1, 40))
def test_spans_are_kept_or_merged_as_a_whole_but_for_one_at_the_border(view: TokenView, cuts: int, tokens: int) -> None:
    """Of the free tokens that are not kept for being recent, at most one span of each row is kept in part."""
    begins = torch.rand(view.valid.shape, generator=generator(cuts)) < 0.3
    begins[:, 1:] |= view.protected[:, 1:] != view.protected[:, :-1]
    view = replace(view, group=begins.long().cumsum(-1))
    reducer = QuickMerge(keep=Count(tokens), layers=1, recency=0.0)
    saliency, plan = reducer.saliency(view), reducer.plan(view)
    for row in range(len(view.valid)):
        free = view.free[row].nonzero().flatten().tolist()
        stay, spans = kept(plan, view, row), {int(view.group[row, j]) for j in free}
        members = {g: [j for j in free if view.group[row, j] == g] for g in spans}
        assert all(len({float(saliency[row, j]) for j in each}) == 1 for each in members.values())
        torn = {g for g, each in members.items() if 0 < len(stay & set(each)) < len(each)}
        assert len({float(saliency[row, members[g][0]]) for g in torn}) <= 1
    again = QuickMerge(keep=Count(tokens), layers=1, recency=0.0, spans="none").plan(view)
    assert_same_plan(QuickMerge(keep=Count(tokens), layers=1, recency=0.0).plan(replace(view, group=None)), again)


def test_recency_1_keeps_the_most_recent_tokens() -> None:
    zeros = torch.zeros(1, 1, 20, 2)
    view = TokenView(
        torch.zeros(1, 20, 1), evidence=Evidence(attention=(AttentionTrace(zeros, zeros, zeros + 1, 1.0),))
    )
    plan = QuickMerge(keep=Count(6), layers=1, recency=1.0).plan(view)
    assert plan.position[0].tolist() == [14, 15, 16, 17, 18, 19]
