"""ToMe against a literal float64 statement of its rounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import LENGTHS, PREFIXES, make, prefix_views, slow_pairs
from strategies import prop, views
from torch import Tensor

from quickmerge.merge.reducers import ToMe
from quickmerge.merge.tokens import AttentionTrace, Count, Evidence, Ratio, TokenView


@dataclass
class Group:
    """Tokens that have become one, standing at ``at``."""

    at: int
    members: list[int]
    weight: float
    metric: Tensor
    guarded: bool


def slow_tome(view: TokenView, row: int, count: int) -> list[Group]:
    """One row, round by round, pair by pair."""
    groups = [
        Group(
            at=i,
            members=[i],
            weight=float(view.size[row, i]),
            metric=view.evidence.attention[-1].key[row, :, i].double().mean(0),
            guarded=bool(view.protected[row, i]),
        )
        for i in view.valid[row].nonzero().flatten().tolist()
    ]
    while len(groups) > count:
        free = [g for g in groups if not g.guarded]
        first, second = free[::2], free[1::2]
        if not second:
            break
        pairs = []
        for a in first:
            alike = [float(torch.cosine_similarity(a.metric, b.metric, dim=0)) for b in second]
            pairs.append((max(alike), a, second[alike.index(max(alike))]))
        pairs.sort(key=lambda pair: -pair[0])
        gone = []
        sums = {id(b): b.weight * b.metric for b in second}
        for _, a, b in pairs[: len(groups) - count]:
            b.members += a.members
            b.weight += a.weight
            sums[id(b)] = sums[id(b)] + a.weight * a.metric
            gone.append(id(a))
        for b in second:
            b.metric = sums[id(b)] / b.weight
        groups = [g for g in groups if id(g) not in gone]
    return groups


@prop(60)
@given(
    views(attention=1, dtypes=(torch.float64,), kinds=("normal",), max_tokens=30, protect=("none", "ends", "some")),
    st.integers(1, 30),
)
def test_the_rounds(view: TokenView, tokens: int) -> None:
    if view.evidence.attention[-1].key.shape[-1] == 1:
        return  # all cosines of numbers are 1 or -1, so rounding decides
    plan = ToMe(keep=Count(tokens)).plan(view)
    for row in range(len(view.valid)):
        count = max(tokens, int((view.protected & view.valid)[row].sum()), 1)
        groups = slow_tome(view, row, min(count, int(view.valid[row].sum())))
        assert plan.position[row][plan.valid[row]].tolist() == [int(view.position[row, g.at]) for g in groups]
        for slot, g in zip(plan.valid[row].nonzero().flatten().tolist(), groups, strict=True):
            assert (plan.slot[row] == slot).nonzero().flatten().tolist() == sorted(g.members)
            for i in g.members:
                assert float(plan.weight[row, i]) == pytest.approx(float(view.size[row, i]) / g.weight, rel=1e-5)


@prop(40)
@given(views(attention=2), st.integers(1, 40))
def test_drops_nothing_and_weighs_by_size(view: TokenView, tokens: int) -> None:
    plan = ToMe(keep=Count(tokens)).plan(view)
    assert torch.equal(plan.slot >= 0, view.valid)
    total = plan.size.gather(1, plan.slot.clamp_min(0))
    share = (view.size / total.clamp_min(1)).to(plan.weight.dtype)
    torch.testing.assert_close(plan.weight[view.valid], share[view.valid], rtol=1e-4, atol=1e-6)


def test_merges_what_is_alike() -> None:
    kinds = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    key = torch.eye(4)[kinds][None, None]
    view = TokenView(torch.zeros(1, 8, 1), evidence=Evidence(attention=(AttentionTrace(key, key, key, 1.0),)))
    plan = ToMe(keep=0.5).plan(view)
    assert plan.slot.tolist() == [kinds.tolist()]
    assert plan.position.tolist() == [[1, 3, 5, 7]] and plan.size.tolist() == [[2] * 4]


def test_reads_the_keys_of_the_last_probed_layer() -> None:
    rng = torch.Generator().manual_seed(0)
    one, two = (AttentionTrace(*(torch.randn(1, 2, 9, 4, generator=rng) for _ in range(3)), 1.0) for _ in range(2))
    hidden = torch.randn(1, 9, 3, generator=rng)
    plans = [
        ToMe(keep=0.5).plan(TokenView(hidden, evidence=Evidence(attention=traces))).slot
        for traces in ((one, two), (two,), (one,))
    ]
    assert torch.equal(plans[0], plans[1]) and not torch.equal(plans[0], plans[2])


def test_attention_above_the_merge_is_proportional() -> None:
    assert ToMe.proportional is True and ToMe().needs.layers == 1


@prop(30)
@given(views(attention=1, protect=("ends", "some")))
def test_the_last_free_tokens_share_one_slot_when_the_budget_is_all_protected(view: TokenView) -> None:
    """Free tokens may not join protected ones and are never dropped, so one slot is left for them."""
    plan = ToMe(keep=Count(1)).plan(view)
    want = (view.protected & view.valid).sum(-1) + view.free.any(-1)
    assert plan.valid.sum(-1).tolist() == want.tolist()


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_round_behind_a_prefix_is_the_papers(tokens: int, prefix: int) -> None:
    """Even positions against odd ones, whatever r, and no more than half of those behind the prefix."""
    if tokens <= prefix:
        return
    most = (tokens - prefix) // 2
    for r in {0, 1, min(13, most), most}:
        view = make(2, tokens, prefix, tokens + r, dtype=torch.float64, merged=True)
        plan = ToMe(keep=Count(max(1, tokens - r))).plan(view)
        plan.check(view)
        merged = plan.merge(view.hidden)
        for row in range(2):
            metric = view.evidence.attention[-1].key[row].mean(0)
            into = dict(slow_pairs(metric.tolist(), prefix, min(r, most)))
            stays = [i for i in range(tokens) if i not in into]
            assert plan.position[row].tolist() == view.position[row, stays].tolist()
            for slot, i in enumerate(stays):
                members = [i, *(a for a, b in into.items() if b == i)]
                size = view.size[row, members].double()
                assert int(plan.size[row, slot]) == int(size.sum())
                want = (size[:, None] * view.hidden[row, members]).sum(0) / size.sum()
                torch.testing.assert_close(merged[row, slot], want, rtol=1e-9, atol=1e-9)


@prop(40)
@given(prefix_views(kinds=("normal",), dtypes=(torch.float64,)), st.integers(1, 20))
def test_rounds_behind_a_prefix(view: TokenView, tokens: int) -> None:
    """As many rounds as it takes, each on the means of the one before; one token is left behind the prefix."""
    plan = ToMe(keep=Count(tokens)).plan(view)
    plan.check(view)
    for row in range(len(view.hidden)):
        metric = list(view.evidence.attention[-1].key[row].mean(0))
        size, members = view.size[row].tolist(), [[i] for i in range(len(metric))]
        while (remove := min(len(metric) - tokens, (len(metric) - view.prefix) // 2)) > 0:
            pairs = slow_pairs([m.tolist() for m in metric], view.prefix, remove)
            total = [s * m for s, m in zip(size, metric, strict=True)]
            for a, b in pairs:
                total[b], size[b], members[b] = total[b] + total[a], size[b] + size[a], members[b] + members[a]
            rest = [i for i in range(len(metric)) if i not in dict(pairs)]
            metric = [total[i] / size[i] for i in rest]
            size, members = [size[i] for i in rest], [members[i] for i in rest]
        assert plan.size[row].tolist() == size
        for slot, group in enumerate(members):
            assert (plan.slot[row] == slot).nonzero().flatten().tolist() == sorted(group)


def test_zero_and_equal_keys_behind_a_prefix_go_in_order() -> None:
    for kind in ("zeros", "twins"):
        view = make(2, 17, 1, 0, kind=kind)
        plan = ToMe(keep=Count(4)).plan(view)
        plan.check(view)
        assert plan.slots == 4 and plan.slot[:, 0].tolist() == [0, 0]
    assert plan.is_identity(view) is False


def test_other_budgets_than_a_count_work_behind_a_prefix() -> None:
    """They go by masks, and the prefix stays in front."""
    for keep in (Ratio(0.5), Ratio(0.1)):
        view = make(3, 41, 1, 0)
        plan = ToMe(keep=keep).plan(view)
        plan.check(view)
        assert plan.slots == math.floor(41 * keep.keep + 0.5) and plan.position[:, 0].tolist() == [0, 0, 0]
