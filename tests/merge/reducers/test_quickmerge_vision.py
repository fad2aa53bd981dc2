"""QuickMerge++ in vision transformers against a literal float64 statement of its saliency and of its rounds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import LENGTHS, PREFIXES, as_masks, make, one_row, prefix_views, ragged, slow_pairs
from strategies import assert_same_plan, assert_same_row, prop, seeds, told

import quickmerge as qm
from quickmerge.merge.reducers import QuickMergeVision, ToMe
from quickmerge.merge.reducers.tofu import mlerp
from quickmerge.merge.tokens import AttentionTrace, Count, Entropy, Evidence, Mass, TokenView


def slow_saliency(view: TokenView, row: int, votes: int) -> dict[int, float]:
    """Mean over heads of the root mean square length of what a token adds to the outputs of the voters."""
    trace, there = view.evidence.attention[-1], view.valid[row].nonzero().flatten().tolist()
    fixed = [i for i in there if view.protected[row, i]]
    free = [i for i in there if i not in fixed]
    most = min(votes, len(free))
    rows = fixed + [free[(2 * i + 1) * len(free) // (2 * most)] for i in range(most)]
    heads = trace.query.shape[1]
    out = dict.fromkeys(there, 0.0)
    for head in range(heads):
        group = head // (heads // trace.key.shape[1])
        added: dict[int, list[float]] = {j: [] for j in there}
        for i in rows:
            # a token of size s is seen s times
            weigh = {
                j: float(view.size[row, j])
                * math.exp(trace.scaling * float(trace.query[row, head, i] @ trace.key[row, group, j]))
                for j in there
            }
            for j in there:
                share = weigh[j] / math.fsum(weigh.values())
                added[j].append(math.hypot(*(share * v for v in trace.value[row, group, j].tolist())))
        for j in there:
            out[j] += math.sqrt(math.fsum(a * a for a in added[j]) / len(rows)) / heads
    return out


@prop(20)
@given(prefix_views(dtypes=(torch.float64,), max_patches=8), st.integers(1, 10), seeds)
def test_saliency(view: TokenView, votes: int, seed: int) -> None:
    for seen in (view, as_masks(view), ragged(view, seed)):
        got = QuickMergeVision(votes=votes).saliency(seen)
        for row in range(len(got)):
            want = slow_saliency(seen, row, votes)
            # log(size) is held in float32
            assert {j: float(got[row, j]) for j in want} == pytest.approx(want, rel=1e-6)
            assert (got[row][~seen.valid[row]] == 0).all()


def slow_groups(view: TokenView, row: int, count: int, alpha: float, saliency: list[float]) -> dict[int, list[int]]:
    """One row, round by round: the members of every slot, by the token that it stands at."""
    key = view.evidence.attention[-1].key[row].double().mean(0)
    groups = [[i] for i in range(len(key))]
    at = list(range(len(key)))
    while True:
        weight = [math.fsum(saliency[i] for i in g) ** alpha for g in groups]
        sizes = [[int(view.size[row, i]) for i in g] for g in groups]
        metric = [
            (sum(s * key[i] for s, i in zip(size, g, strict=True)) / sum(size)).tolist()
            for size, g in zip(sizes, groups, strict=True)
        ]
        remove = min(len(groups) - count, (len(groups) - view.prefix) // 2)
        if remove <= 0:
            return dict(zip(at, groups, strict=True))
        pairs = slow_pairs(metric, view.prefix, remove, weight)
        for a, b in pairs:
            groups[b] = groups[b] + groups[a]
        gone = {a for a, _ in pairs}
        at = [x for i, x in enumerate(at) if i not in gone]
        groups = [g for i, g in enumerate(groups) if i not in gone]


def assert_slow(view: TokenView, count: int, alpha: float) -> None:
    reducer = QuickMergeVision(keep=Count(count), alpha=alpha)
    plan, saliency = reducer.plan(view), reducer.saliency(view)
    plan.check(view)
    for row in range(len(view.hidden)):
        groups = slow_groups(view, row, count, alpha, saliency[row].tolist())
        assert plan.position[row].tolist() == [int(view.position[row, i]) for i in groups]
        for slot, members in enumerate(groups.values()):
            assert (plan.slot[row] == slot).nonzero().flatten().tolist() == sorted(members)
            total = sum(int(view.size[row, i]) for i in members)
            assert int(plan.size[row, slot]) == total
            for i in members:
                assert float(plan.weight[row, i]) == pytest.approx(int(view.size[row, i]) / total, rel=1e-6)


@prop(40)
@given(
    prefix_views(dtypes=(torch.float64,), kinds=("normal",), max_patches=20),
    st.integers(1, 20),
    st.sampled_from((0.25, 1.0, 3)),
)
def test_the_rounds(view: TokenView, tokens: int, alpha: float) -> None:
    assert_slow(view, tokens, alpha)


@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_round_over_lengths(tokens: int) -> None:
    for prefix in PREFIXES:
        if tokens > prefix:
            view = make(2, tokens, prefix, tokens, dtype=torch.float64)
            assert_slow(view, max(1, tokens - min(16, (tokens - prefix) // 2)), 1.0)


@prop(30)
@given(prefix_views(), st.integers(1, 30))
def test_without_saliency_it_is_tome(view: TokenView, tokens: int) -> None:
    reducer = QuickMergeVision(keep=Count(tokens), alpha=0, operator="average")
    plan, tome = reducer.plan(view), ToMe(keep=Count(tokens)).plan(view)
    assert_same_plan(plan, tome)
    assert torch.equal(reducer.combine(view, plan, view.hidden), tome.merge(view.hidden))
    scaled = QuickMergeVision(alpha=0).combine(view, plan, view.hidden)
    assert torch.equal(scaled, mlerp(plan, view.hidden))


@prop(15)
@given(prefix_views(kinds=("normal",), dtypes=(torch.float64,)), seeds)
def test_images_may_get_budgets_of_their_own(view: TokenView, seed: int) -> None:
    for budget in (Entropy(scale=0.5), Entropy(high=0.6), Mass(0.7)):
        reducer = QuickMergeVision(keep=budget)
        for seen in (view, ragged(view, seed)):
            plan = reducer.plan(seen)
            plan.check(seen)
            want = budget.count(seen, reducer.saliency(seen))
            least = (seen.protected & seen.valid).sum(-1) + seen.free.any(-1)
            assert plan.valid.sum(-1).tolist() == torch.maximum(want, least).tolist()
        for row in range(len(seen.hidden)):
            one = one_row(seen, row)
            assert_same_row(told(plan, seen, row), told(reducer.plan(one), one, 0))


def test_what_is_read_stays_and_what_is_not_goes() -> None:
    """Two pairs of twins: those that nobody looks at merge first, though the others are as alike."""
    n, key = 9, torch.zeros(1, 1, 9, 6)
    for i, axis in enumerate((0, 1, 1, 2, 2, 3, 3, 4, 4)):
        key[0, 0, i, axis] = 1.0
    key[0, 0, 1::2] += 0.01 * torch.eye(6)[5]  # the partners differ by as much in every pair
    read = torch.zeros(6)
    read[1], read[2], read[3] = 6.0, 4.0, 2.0
    query = read.expand(1, 1, n, 6).clone()
    value = torch.ones(1, 1, n, 2)
    view = TokenView(
        torch.zeros(1, n, 2), prefix=1, evidence=Evidence(attention=(AttentionTrace(query, key, value, 1.0),))
    )
    for count, merged in ((8, [[7, 8]]), (7, [[5, 6], [7, 8]]), (6, [[3, 4], [5, 6], [7, 8]])):
        slot = QuickMergeVision(keep=Count(count), alpha=1.0).plan(view).slot[0].tolist()
        assert [[i for i, s in enumerate(slot) if s == k] for k in sorted(set(slot)) if slot.count(k) > 1] == merged


def test_no_saliency_at_all_is_no_harm() -> None:
    view = make(1, 17, 1, 0)
    (trace,) = view.evidence.attention
    mute = replace(
        view,
        valid=None,
        protected=None,
        evidence=replace(view.evidence, attention=(replace(trace, value=torch.zeros_like(trace.value)),)),
    )
    plan = QuickMergeVision(keep=Count(10)).plan(mute)
    plan.check(mute)
    assert plan.slots == 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": -0.1}, "alpha must be a number of at least 0, got -0.1"),
        ({"alpha": math.inf}, "alpha must be a number of at least 0, got inf"),
        ({"alpha": math.nan}, "alpha must be a number of at least 0, got nan"),
        ({"alpha": "1"}, "alpha must be a number of at least 0, got '1'"),
        ({"alpha": True}, "alpha must be a number of at least 0, got True"),
        ({"votes": 0}, "votes must be a whole number of at least 1, got 0"),
        ({"votes": 2.5}, "votes must be a whole number of at least 1, got 2.5"),
        ({"operator": "max"}, "operator must be one of mlerp, average, got 'max'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        QuickMergeVision(**settings)
    assert message in str(error.value)


def test_in_a_model_with_budgets_of_their_own() -> None:
    """Rows of different lengths go through the blocks: each image comes out as it does alone."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56, "patch_size": 8}
    model = Dinov2Model(Dinov2Config(**sizes)).eval()
    pixels = torch.randn(3, 3, 56, 56) * torch.tensor([0.1, 1.0, 5.0])[:, None, None, None]
    pixels[0, :, :, 28:] = 0
    reducer = QuickMergeVision(keep=Entropy(scale=0.7))
    with torch.no_grad(), qm.reduce(model, reducer, layer=(1, 2)) as run:
        together = model(pixels).pooler_output
        sizes_left = run.call.plans[1].valid.sum(-1).tolist()
        alone = torch.cat([model(image[None]).pooler_output for image in pixels])
    assert max(sizes_left) < 50
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
