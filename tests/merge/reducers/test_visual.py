"""Choosing visual tokens without a model, for engines that serve them in their own way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import quickmerge as qm
from quickmerge.merge.reducers import VISUAL_TOKEN_REDUCERS
from quickmerge.merge.reducers.base import merge_visual_tokens
from quickmerge.merge.tokens import Evidence
from quickmerge.merge.tokens.budget import kept_of
from quickmerge.merge.tokens.plan import anchors_of


def told(rows: int, tokens: int, seed: int = 0) -> dict[str, Any]:
    noise = torch.Generator().manual_seed(seed)
    return {
        "saliency": torch.rand(rows, tokens, generator=noise),
        "key": torch.randn(rows, tokens, 4, generator=noise),
        "text": torch.randn(rows, 3, 8, generator=noise),
        "text_valid": torch.tensor([[True, True, False]]).expand(rows, -1),
        "grid": (1, 3, tokens // 3),
    }


def features(rows: int, tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VISUAL_TOKEN_REDUCERS)
@pytest.mark.parametrize("keep", [0.5, qm.Count(4), qm.Count(99), 1.0])
def test_the_count_is_known_beforehand(name: str, keep: Any) -> None:
    reducer = VISUAL_TOKEN_REDUCERS[name](keep=keep)
    kept, plan = qm.select_visual_tokens(features(2, 12), reducer, **told(2, 12))
    wanted = min(keep.tokens, 12) if isinstance(keep, qm.Count) else round(12 * keep)
    assert kept.sum(-1).tolist() == [wanted] * 2
    plan.check(qm.TokenView(features(2, 12)))
    assert plan.slots == wanted


@pytest.mark.parametrize("name", VISUAL_TOKEN_REDUCERS)
def test_padding_changes_nothing(name: str) -> None:
    reducer, alone, wide = VISUAL_TOKEN_REDUCERS[name](keep=qm.Count(4)), told(1, 12), told(1, 15)
    there = torch.arange(15)[None] < 12
    x = features(1, 12)
    for key in ("saliency", "key"):
        wide[key] = torch.cat([alone[key], wide[key][:, :3]], 1)
    wide |= {"text": alone["text"], "grid": alone["grid"]}
    kept, _ = qm.select_visual_tokens(x, reducer, **alone)
    padded, _ = qm.select_visual_tokens(torch.cat([x, 9 + x[:, :3]], 1), reducer, **wide, valid=there)
    assert torch.equal(padded[:, :12], kept)
    assert not padded[:, 12:].any()


@given(tokens=st.integers(4, 12), count=st.integers(1, 5), seed=st.integers(0, 99))
def test_slots_stand_where_a_member_stood(tokens: int, count: int, seed: int) -> None:
    view = qm.TokenView(
        features(2, tokens, seed), position=_places(tokens, seed), evidence=Evidence(key=features(2, tokens, seed + 1))
    )
    for reducer in (qm.ToMe(keep=qm.Count(count)), qm.Uniform(keep=qm.Count(count))):
        plan = reducer.plan(view)
        seats = anchors_of(plan, view)
        assert torch.equal(view.position.gather(1, seats), plan.position)
        slots = torch.arange(plan.slots).expand_as(seats)
        assert torch.equal(plan.slot.gather(1, seats), slots)


def _places(tokens: int, seed: int) -> torch.Tensor:
    gaps = torch.randint(1, 4, (2, tokens), generator=torch.Generator().manual_seed(seed))
    return gaps.cumsum(-1)


def test_what_is_needed_is_named() -> None:
    x = features(1, 12)
    for reducer, message in (
        (qm.SCOPE(keep=0.5), "attention must hold the trace"),
        (qm.ToMe(keep=0.5), "attention must hold the trace"),
        (qm.TrimTokenator(keep=0.5), "text must be"),
        (qm.Pool(keep=0.5), "grid must be"),
        (qm.SCOPE(keep=qm.Entropy()), "keep must be a share or a Count"),
        (qm.Truncate(keep=0.5), "reducer must be one for visual tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            qm.select_visual_tokens(x, reducer)
    with pytest.raises(ValueError, match=r"key must be \(1, 12, features\), got \(1, 11, 4\)"):
        qm.select_visual_tokens(x, qm.ToMe(keep=0.5), key=torch.zeros(1, 11, 4))


@pytest.mark.parametrize("name", VISUAL_TOKEN_REDUCERS)
@pytest.mark.parametrize("keep", [0.5, qm.Count(4), 1.0])
def test_what_a_language_model_is_given_is_the_plan_carried_out(name: str, keep: Any) -> None:
    reducer = VISUAL_TOKEN_REDUCERS[name](keep=keep, **({"aligned": 1} if name == "trimtokenator" else {}))
    hidden, x = features(2, 12, seed=5), features(2, 12)
    evidence = {key: value for key, value in told(2, 12).items() if not key.startswith("text")}
    made, anchors, plan = merge_visual_tokens(hidden, reducer, features=x, depth=6, **evidence)
    kept, same = qm.select_visual_tokens(x, reducer, depth=6, **evidence)
    assert torch.equal(plan.slot, same.slot) and torch.equal(kept.nonzero()[:, 1].view(2, -1), anchors)
    assert made.shape[1] == kept_of(reducer.keep, 12)
    if keep == 1.0:
        assert torch.equal(made, hidden)
        return
    for row in range(2):
        for slot, anchor in enumerate(anchors[row].tolist()):
            members = (plan.slot[row] == slot).nonzero().flatten().tolist()
            assert anchor in members
            mean = sum(plan.weight[row, i].double() * hidden[row, i].double() for i in members)
            if name == "quickmerge" and len(members) > 1:  # as long as the longest of them
                mean = mean / mean.norm() * max(hidden[row, i].double().norm() for i in members)
            torch.testing.assert_close(made[row, slot].double(), mean, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 400), st.one_of(st.floats(0.001, 1.0), st.integers(1, 500).map(qm.Count)))
def test_how_many_are_kept_is_what_the_budget_counts(tokens: int, keep: Any) -> None:
    view = qm.TokenView(torch.zeros(1, tokens, 1))
    assert kept_of(keep, tokens) == int(qm.Random(keep=keep).budget.count(view, None))


def test_a_budget_that_looks_at_tokens_has_no_number() -> None:
    with pytest.raises(ValueError, match="budget must be a share or a Count"):
        kept_of(qm.Entropy(), 12)
    with pytest.raises(ValueError, match="tokens must be a whole number of at least 1"):
        kept_of(0.5, 0)


@pytest.mark.parametrize("name", ["tome", "tofu", "quickmerge", "pool"])
def test_counting_sizes_is_a_setting(name: str) -> None:
    kind = VISUAL_TOKEN_REDUCERS[name]
    assert kind.proportional and kind().proportional and not kind(proportional=False).proportional
    assert kind(proportional=False).label == f"{name}:proportional=False"
    assert qm.Recipe.from_dict(qm.Recipe(visual=kind(proportional=False)).as_dict()) == qm.Recipe(
        visual=kind(proportional=False)
    )
    with pytest.raises(ValueError, match="proportional must be True or False, got 1"):
        kind(proportional=1)
