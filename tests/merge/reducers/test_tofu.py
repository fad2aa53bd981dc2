"""ToFu against a literal float64 statement: the paper's matching, then drop or MLERP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import LENGTHS, PREFIXES, make, prefix_views, slow_pairs
from strategies import assert_same_plan, prop

from quickmerge.merge.reducers import ToFu, ToMe
from quickmerge.merge.reducers.tome import mean_key
from quickmerge.merge.tokens import Count, Evidence, MergePlan, TokenView


def pairs_of(view: TokenView, row: int, remove: int) -> list[tuple[int, int]]:
    metric = view.evidence.attention[-1].key[row].double().mean(0).tolist()
    return slow_pairs(metric, view.prefix, remove)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_one_round(tokens: int, prefix: int) -> None:
    """Over lengths, prefixes and an r that is too large: which go, into whom, and what comes out."""
    if tokens <= prefix:
        return
    most = (tokens - prefix) // 2
    for r in {0, 1, min(16, most), most}:
        low, high = (make(2, tokens, prefix, 7 * tokens + r, dtype=torch.float64, layer=layer) for layer in (5, 6))
        tofu = ToFu(keep=Count(max(1, tokens - r)))
        pruned, merged = tofu.plan(low), tofu.plan(high)
        pruned.check(low)
        merged.check(high)
        kept, out = tofu.combine(low, pruned, low.hidden), tofu.combine(high, merged, high.hidden)
        for row in range(2):
            into = dict(pairs_of(high, row, min(r, most)))
            stays = [i for i in range(tokens) if i not in into]
            for plan in (pruned, merged):
                assert plan.position[row].tolist() == stays
            # pruned: those that stay, as they were
            assert torch.equal(kept[row], low.hidden[row, stays]) and pruned.size[row].tolist() == [1] * len(stays)
            assert [i for i, s in enumerate(pruned.slot[row].tolist()) if s < 0] == sorted(into)
            for slot, i in enumerate(stays):
                members = [i, *(a for a, b in into.items() if b == i)]
                assert int(merged.size[row, slot]) == len(members)
                assert (merged.slot[row] == slot).nonzero().flatten().tolist() == sorted(members)
                vectors = high.hidden[row, members]
                mean = vectors.mean(0)
                want = mean / mean.norm() * vectors.norm(dim=-1).max() if len(members) > 1 else high.hidden[row, i]
                torch.testing.assert_close(out[row, slot], want, rtol=1e-6, atol=1e-6)


@prop(40)
@given(prefix_views(), st.integers(1, 30))
def test_merging_by_size_from_the_first_block_on_is_tome(view: TokenView, tokens: int) -> None:
    tofu = ToFu(keep=Count(tokens), switch=0, operator="average", weighted=True)
    plan, tome = tofu.plan(view), ToMe(keep=Count(tokens)).plan(view)
    assert_same_plan(plan, tome)
    assert torch.equal(tofu.combine(view, plan, view.hidden), tome.merge(view.hidden))


@prop(40)
@given(prefix_views(kinds=("normal",), merged=True), st.integers(1, 30), st.sampled_from(("mlerp", "average")))
def test_the_plain_mean_is_plain_over_rounds_and_sizes(view: TokenView, tokens: int, operator: str) -> None:
    """Whatever a token stood for before, and in however many rounds a slot came together."""
    tofu = ToFu(keep=Count(tokens), operator=operator)
    plan = tofu.plan(view)
    plan.check(view)
    crowd = torch.stack([(plan.slot == plan.slot[:, i : i + 1]).sum(-1) for i in range(plan.slot.shape[1])], 1)
    torch.testing.assert_close(plan.weight, (1 / crowd).to(plan.weight.dtype), rtol=1e-5, atol=1e-6)


@prop(30)
@given(prefix_views(layer=0, merged=True), st.integers(1, 30))
def test_pruned_tokens_do_not_count(view: TokenView, tokens: int) -> None:
    plan = ToFu(keep=Count(tokens)).plan(view)
    plan.check(view)
    for row in range(len(view.hidden)):
        stays = (plan.slot[row] >= 0).nonzero().flatten()
        assert len(stays) == plan.slots
        assert plan.size[row].tolist() == view.size[row, stays].tolist()
        assert (plan.weight[row][plan.slot[row] < 0] == 0).all()


@prop(20)
@given(prefix_views(kinds=("normal",), dtypes=(torch.float64,)), st.integers(1, 20))
def test_pruning_takes_those_that_tome_merges(view: TokenView, r: int) -> None:
    """In one round, that is: in later ones the metric of a slot is a mean, or that of the token that stayed."""
    r = min(r, (view.hidden.shape[1] - view.prefix) // 2)
    keep = Count(max(1, view.hidden.shape[1] - r))
    tome, tofu = ToMe(keep=keep).plan(view), ToFu(keep=keep, switch=99).plan(view)
    assert torch.equal(tome.position, tofu.position)
    alone = [(row == row[i]).sum() == 1 for row in tome.slot for i in range(len(row))]
    stays = torch.tensor(alone).view_as(tome.slot) & (tofu.slot >= 0)
    assert torch.equal(tome.slot[stays], tofu.slot[stays])


def test_the_switch() -> None:
    view = make(1, 17, 1, 0)

    def prunes(switch: int | None, layer: int | None, depth: int | None = 12) -> bool:
        seen = TokenView(
            view.hidden, prefix=1, evidence=Evidence(attention=view.evidence.attention, layer=layer, depth=depth)
        )
        return bool((ToFu(keep=Count(12), switch=switch).plan(seen).slot < 0).any())

    assert [prunes(None, layer) for layer in (0, 5, 6, 11)] == [True, True, False, False]
    assert [prunes(None, layer, 5) for layer in (0, 1, 2, 4)] == [True, True, False, False]
    assert [prunes(3, layer, None) for layer in (2, 3)] == [True, False]
    assert not prunes(0, 0) and prunes(12, 11)
    with pytest.raises(ValueError, match="layer must be the number of the view's block for tofu, got None"):
        prunes(3, None)
    with pytest.raises(ValueError, match=r"depth must be the model's number of blocks .*, got None"):
        prunes(None, 3, None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"switch": -1}, "switch must be a whole number of at least 0, got -1"),
        ({"switch": 2.0}, "switch must be a whole number of at least 0, got 2.0"),
        ({"operator": "slerp"}, "operator must be one of mlerp, average, got 'slerp'"),
        ({"weighted": 1}, "weighted must be True or False, got 1"),
        ({"keep": 0}, "keep must be a number in (0, 1]"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        ToFu(**settings)
    assert message in str(error.value)


def test_equal_and_zero_keys_go_in_order() -> None:
    """Ties go to the earlier token, and a zero vector is like nothing."""
    view = make(1, 9, 1, 0, kind="zeros")
    plan = ToFu(keep=Count(7), switch=0).plan(view)
    assert plan.position.tolist() == [[0, 1, 3, 5, 6, 7, 8]] and plan.size.tolist() == [[1, 3, 1, 1, 1, 1, 1]]
    assert (mean_key(view, "tofu") == 0).all()
    assert torch.equal(ToFu(switch=0).combine(view, plan, view.hidden), view.hidden[:, :7])


def test_half_precision_keeps_norms() -> None:
    view = make(2, 40, 1, 3)
    tofu = ToFu(keep=Count(25))
    plan = tofu.plan(view)
    fine, coarse = tofu.combine(view, plan, view.hidden), tofu.combine(view, plan, view.hidden.bfloat16())
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), fine, rtol=0.02, atol=0.02)


def test_plan_is_a_merge_plan_for_vision_alone() -> None:
    assert ToFu.places == ("vision",) and ToFu.proportional and ToFu().needs.layers == 1
    assert isinstance(ToFu(keep=Count(9)).plan(make(1, 17, 1, 0)), MergePlan)
