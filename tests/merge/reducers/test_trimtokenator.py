"""TrimTokenator against literal float64 statements of its two stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, KINDS, assert_same_row, generator, numbers, prop, seeds, told, up_to
from torch import Tensor

import quickmerge as qm
from quickmerge.merge.reducers import VISION_REDUCERS, VISUAL_TOKEN_REDUCERS, make_reducer
from quickmerge.merge.reducers.trimtokenator import alignment
from quickmerge.merge.tokens import Count, Entropy, Evidence, MergePlan, Ratio, TokenView


def slow_alignment(x: Tensor, text: Tensor, normalize: bool, norm: int) -> list[float]:
    """Of ``(N, D)`` to ``(M, D)``: pair by pair."""

    def scaled(v: list[float]) -> list[float]:
        length = math.sqrt(math.fsum(a * a for a in v)) if normalize else 1.0
        return [a / length if length else 0.0 for a in v]

    def distance(v: list[float], e: list[float]) -> float:
        return math.fsum(abs(a - b) ** norm for a, b in zip(v, e, strict=True))

    tokens, words = ([scaled(v) for v in y.double().tolist()] for y in (x, text))
    return [-math.fsum(distance(v, e) for e in words) / len(words) for v in tokens]


def slow_trim(x: Tensor, text: Tensor, count: int, reducer: qm.TrimTokenator) -> list[int]:
    """Which of ``(N, D)`` stay."""
    n = len(x)
    near = slow_alignment(x, text, reducer.normalize, reducer.norm)
    first = max(count, math.floor(reducer.aligned * n + 0.5 + 1e-9))
    left = sorted(range(n), key=lambda i: (-near[i], i))[:first]
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    chosen: list[int] = []
    for _ in range(min(count, n)):
        cost = {}
        for i in sorted(set(left) - set(chosen)):
            cosines = [float(unit[i] @ unit[j]) for j in (chosen or left)]
            worst = reducer.objective == "min" and bool(chosen)
            cost[i] = max(cosines) if worst else math.fsum(cosines) / len(cosines)
        chosen.append(min(cost, key=lambda i: cost[i]))
    return sorted(chosen)


def view_of(batch: int, tokens: int, words: int, seed: int, dtype: torch.dtype = torch.float64) -> TokenView:
    draws = generator(seed)
    x = torch.randn(batch, tokens, 6, generator=draws, dtype=torch.float64)
    text = 0.5 + torch.randn(batch, words, 6, generator=draws, dtype=torch.float64)
    return TokenView(x.to(dtype), grid=(1, 1, tokens), evidence=Evidence(text=text.to(dtype)))


def stays(plan: MergePlan, row: int) -> list[int]:
    return (plan.slot[row] >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
@prop(25)
@given(data=st.data(), batch=up_to(3), n=up_to(12), m=up_to(6), seed=seeds)
def test_the_closed_form_is_the_mean_over_pairs(
    normalize: bool, norm: int, data: st.DataObject, batch: int, n: int, m: int, seed: int
) -> None:
    """Whatever the padding of the text holds."""
    draws, dtype, kind = generator(seed), data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(KINDS))
    x, text = (numbers((batch, k, 5), kind, draws, dtype) for k in (n, m))
    there = torch.rand(batch, m, generator=draws) < 0.7
    there[:, 0] = True
    got = alignment(x, torch.where(there[..., None], text, math.nan), there, normalize, norm)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    tight = 1e-9 if dtype == torch.float64 else 1e-5
    for row in range(batch):
        want = slow_alignment(x[row], text[row, there[row]], normalize, norm)
        assert got[row].tolist() == pytest.approx(want, rel=tight, abs=10 * tight)


@pytest.mark.parametrize("norm", [1, 2])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("objective", ["sum", "min"])
def test_both_stages_are_the_literal_loops(norm: int, normalize: bool, objective: str) -> None:
    """By masks and by shapes, and with a prefix, which stays and is not looked at."""
    for seed in range(25):
        tokens, count = 7 + seed % 11, 1 + seed % 7
        aligned = (0.4, 0.8, 1.0)[seed % 3]  # three survive at least: of two, both are as near their mean
        view = view_of(2, tokens, 4, seed)
        reducer = qm.TrimTokenator(Count(count), aligned, normalize, norm, objective)
        shaped = replace(view, valid=None, protected=None, prefix=0)
        for seen in (view, shaped):
            plan = reducer.plan(seen)
            plan.check(seen)
            for row in range(2):
                assert stays(plan, row) == slow_trim(view.hidden[row], view.evidence.text[row], count, reducer)
        prefix = torch.full((2, 2, 6), 3.0, dtype=torch.float64)
        behind = TokenView(torch.cat([prefix, view.hidden], 1), prefix=2, evidence=Evidence(text=view.evidence.text))
        plan = replace(reducer, keep=Count(count + 2)).plan(behind)
        plan.check(behind)
        want = slow_trim(view.hidden[0], view.evidence.text[0], count, reducer)
        assert stays(plan, 0) == [0, 1, *(i + 2 for i in want)]


@prop(30)
@given(st.integers(0, 3), seeds, st.sampled_from((Ratio(0.4), Count(5), Ratio(1.0))), st.sampled_from((0.5, 1.0)))
def test_a_batch_equals_its_rows(spare: int, seed: int, budget: Any, aligned: float) -> None:
    """Tokens and text padded, on either side, with nonsense; protected tokens anywhere."""
    draws = generator(seed)
    view = view_of(3, 14, 5, seed)
    n = torch.tensor([14, 11 - spare, 1])
    m = torch.tensor([5, 1, 3])
    index = torch.arange(14)
    valid = index >= 14 - n[:, None] if seed % 2 else index < n[:, None]
    words = torch.arange(5) < m[:, None]
    guarded = (torch.rand(3, 14, generator=draws) < 0.2) & valid
    batch = TokenView(
        torch.where(valid[..., None], view.hidden, 1e300),
        valid=valid,
        protected=guarded,
        evidence=Evidence(text=torch.where(words[..., None], view.evidence.text, math.nan), text_valid=words),
    )
    reducer = qm.TrimTokenator(budget, aligned)
    plan = reducer.plan(batch)
    plan.check(batch)
    assert plan.valid.sum(-1).tolist() == budget.count(batch, None).tolist()
    for row in range(3):
        there = valid[row]
        one = TokenView(
            view.hidden[row, there][None],
            protected=guarded[row, there][None],
            evidence=Evidence(text=view.evidence.text[row, words[row]][None]),
        )
        assert_same_row(told(plan, batch, row), told(reducer.plan(one), one, 0))


@prop(30)
@given(st.data(), up_to(3), up_to(20), st.integers(1, 25), seeds)
def test_tokens_of_any_kind_give_lawful_plans(data: st.DataObject, batch: int, n: int, count: int, seed: int) -> None:
    draws, dtype = generator(seed), data.draw(st.sampled_from(FLOATS))
    x = numbers((batch, n, 3), data.draw(st.sampled_from(KINDS)), draws, dtype)
    text = numbers((batch, 4, 3), data.draw(st.sampled_from(KINDS)), draws, dtype)
    settings = {"norm": data.draw(st.sampled_from((1, 2))), "objective": data.draw(st.sampled_from(("sum", "min")))}
    reducer = qm.TrimTokenator(Count(count), normalize=data.draw(st.booleans()), **settings)
    for view in (TokenView(x, evidence=Evidence(text=text)), TokenView(x, prefix=0, evidence=Evidence(text=text))):
        plan = reducer.plan(view)
        plan.check(view)
        assert plan.valid.sum(-1).tolist() == [min(count, n)] * batch
        assert (plan.position[:, 1:] > plan.position[:, :-1]).all()


def test_the_first_stage_never_starves_the_budget() -> None:
    view = view_of(2, 20, 3, 0)
    assert qm.TrimTokenator(Count(15), aligned=0.1).plan(view).valid.sum(-1).tolist() == [15, 15]
    for keep in (1.0, Count(20), Count(99)):
        assert qm.TrimTokenator(keep, aligned=0.1).plan(view).is_identity(view)


def test_tokens_too_long_for_their_squares_are_far_and_not_lost() -> None:
    view = view_of(1, 20, 3, 0, torch.float32)
    hidden = torch.where(torch.arange(20)[:, None] < 15, view.hidden * 1e30, view.hidden)
    for prefix in (None, 0):
        seen = TokenView(hidden, prefix=prefix, evidence=Evidence(text=view.evidence.text))
        for count in (3, 8, 19):
            plan = qm.TrimTokenator(Count(count), aligned=0.1).plan(seen)
            plan.check(seen)
            assert plan.slots == count and (count > 5 or min(stays(plan, 0)) >= 15)


def test_equal_tokens_go_in_order_and_copies_come_last() -> None:
    text = torch.ones(1, 2, 4)
    assert stays(qm.TrimTokenator(Count(3)).plan(TokenView(torch.zeros(1, 8, 4), evidence=Evidence(text=text))), 0) == [
        0,
        1,
        2,
    ]
    twins = torch.eye(4)[torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])][None]  # all equally near to the text
    for objective in ("sum", "min"):
        plan = qm.TrimTokenator(Count(4), aligned=1.0, objective=objective).plan(TokenView(twins))
        assert stays(plan, 0) == [0, 2, 4, 6]


def test_the_text_decides_and_its_order_does_not() -> None:
    view = view_of(1, 40, 6, 0)
    reducer = qm.TrimTokenator(Count(8), aligned=0.4)
    plan = reducer.plan(view)
    shuffled = replace(
        view, evidence=replace(view.evidence, text=view.evidence.text[:, torch.tensor([3, 0, 5, 1, 4, 2])])
    )
    assert torch.equal(reducer.plan(shuffled).slot, plan.slot)
    assert not torch.equal(
        reducer.plan(replace(view, evidence=replace(view.evidence, text=-3 * view.evidence.text))).slot, plan.slot
    )


def test_lengths_drown_the_text_unless_they_are_taken_out() -> None:
    """The weakness that the docstring names, and what helps: of long tokens and a short text, the shortest stay."""
    view = view_of(1, 40, 6, 1)
    far = replace(view, evidence=replace(view.evidence, text=view.evidence.text / 100))
    length = view.hidden[0].norm(dim=-1)
    plain, unit = (qm.TrimTokenator(keep=0.2, normalize=n).alignment(far)[0] for n in (False, True))
    assert (plain.argsort() == (-length).argsort()).float().mean() > 0.8
    words = torch.nn.functional.normalize(view.evidence.text[0], dim=-1).mean(0)
    want = torch.nn.functional.normalize(view.hidden[0], dim=-1) @ words
    assert torch.equal(unit.argsort(), want.argsort())


def test_half_precision_is_compared_in_single() -> None:
    view = view_of(2, 40, 6, 0, torch.bfloat16)
    fine = replace(view, hidden=view.hidden.float(), evidence=replace(view.evidence, text=view.evidence.text.float()))
    for norm in (1, 2):
        reducer = qm.TrimTokenator(keep=0.3, norm=norm)
        assert torch.equal(reducer.plan(view).slot, reducer.plan(fine).slot)


@pytest.mark.parametrize("norm", [1, 2])
def test_planning_by_shapes_compiles_whole(norm: int) -> None:
    view = view_of(2, 30, 4, 0, torch.float32)
    reducer = qm.TrimTokenator(Count(9), norm=norm)

    def run(x: Tensor, text: Tensor, words: Tensor) -> tuple[Tensor, ...]:
        plan = reducer.plan(TokenView(x, prefix=1, evidence=Evidence(text=text, text_valid=words)))
        return plan.slot, plan.position, plan.merge(x)

    words = torch.tensor([[True, True, False, False], [True] * 4])
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    for got, want in zip(
        compiled(view.hidden, view.evidence.text, words), run(view.hidden, view.evidence.text, words), strict=True
    ):
        torch.testing.assert_close(got, want)


def test_what_it_lacks_is_named() -> None:
    view = view_of(2, 9, 3, 0)
    bare = replace(view, evidence=replace(view.evidence, text=None, text_valid=None))
    for seen in (bare, replace(bare, valid=None, protected=None, prefix=1)):
        with pytest.raises(ValueError, match=r"text must be \(B, M, D\) embeddings .* for trimtokenator, got none"):
            qm.TrimTokenator(Count(4)).plan(seen)
    qm.TrimTokenator(keep=0.5, aligned=1.0).plan(bare).check(bare)  # nobody asks the text
    with pytest.raises(ValueError, match="text must have as many features as the tokens, 6, got 5"):
        qm.TrimTokenator(keep=0.5).plan(
            replace(view, evidence=replace(view.evidence, text=view.evidence.text[..., :5]))
        )
    with pytest.raises(ValueError, match="budget Entropy needs a saliency"):
        qm.TrimTokenator(Entropy()).plan(view)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"text": torch.zeros(3, 4, 1)}, r"text must be \(2, text tokens, features\) .* got shape \(3, 4, 1\)"),
        ({"text": torch.zeros(2, 0, 1)}, r"text must be \(2, text tokens, features\) with a token at least"),
        ({"text": torch.zeros(2, 4)}, r"text must be .* got shape \(2, 4\)"),
        ({"text_valid": torch.ones(2, 4).bool()}, "text_valid must be left out where there is no text"),
        (
            {"text": torch.zeros(2, 4, 1), "text_valid": torch.ones(2, 3).bool()},
            r"text_valid must have shape \(2, 4\), got \(2, 3\)",
        ),
        (
            {"text": torch.zeros(2, 1, 1), "text_valid": torch.tensor([[True], [False]])},
            "text_valid must mark at least one token in every row",
        ),
    ],
)
def test_a_bad_text_is_named(fields: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenView(torch.zeros(2, 3, 1), evidence=Evidence(**fields))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aligned": 0}, "aligned must be a number in (0, 1], got 0"),
        ({"aligned": 1.1}, "aligned must be a number in (0, 1], got 1.1"),
        ({"aligned": True}, "aligned must be a number in (0, 1], got True"),
        ({"normalize": 1}, "normalize must be True or False, got 1"),
        ({"norm": 3}, "norm must be 1 or 2, got 3"),
        ({"norm": True}, "norm must be 1 or 2, got True"),
        ({"objective": "max"}, "objective must be one of sum, min, got 'max'"),
    ],
)
def test_bad_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        qm.TrimTokenator(**settings)
    assert str(error.value) == message


def test_it_has_its_name_and_place() -> None:
    assert VISUAL_TOKEN_REDUCERS["trimtokenator"] is qm.TrimTokenator
    assert set(VISUAL_TOKEN_REDUCERS) == {*VISION_REDUCERS, "trimtokenator"} and "trimtokenator" not in VISION_REDUCERS
    reducer = qm.TrimTokenator(keep=0.2, normalize=True, objective="min")
    assert reducer.label == "trimtokenator:normalize=True:objective=min"
    assert make_reducer(reducer.label, place="visual", keep=0.2) == reducer
    assert qm.TrimTokenator.once and qm.TrimTokenator.places == ("vision",)
