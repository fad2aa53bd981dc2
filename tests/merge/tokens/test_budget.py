from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import PREFIXES, as_masks, prefix_views
from strategies import (
    FLOATS,
    alone,
    counts,
    generator,
    plain_budgets,
    prop,
    saliency_budgets,
    seeds,
    shares,
    views,
    without_exempt,
)
from torch import Tensor

from quickmerge.merge.tokens import Budget, Count, Entropy, Mass, Ratio, Remaining, TokenView, as_budget
from quickmerge.merge.tokens.budget import effective_tokens, fixed_count, lowest, round_half_up, select


def scores(view: TokenView, kind: str, seed: int) -> Tensor:
    """Non-negative saliency; ``tied`` has many equal values, ``flat`` only one, ``zeros`` none above zero."""
    shape, rng = view.valid.shape, generator(seed)
    if kind == "flat":
        return torch.full(shape, 0.3)
    if kind == "zeros":
        return torch.zeros(shape)
    x = torch.rand(shape, generator=rng)
    return (x * 4).floor() if kind == "tied" else x.pow(6)


score_kinds = st.sampled_from(("random", "tied", "flat", "zeros"))


def clamped(wanted: int, view: TokenView, row: int) -> int:
    low = max(1, int((view.protected & view.valid)[row].sum()))
    return min(max(wanted, low), int(view.valid[row].sum()))


def half_up(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


@prop(80)
@given(views(), shares)
def test_ratio_is_of_the_original_length(view: TokenView, keep: float) -> None:
    got = Ratio(keep).count(view, None)
    assert got.dtype == torch.long and got.shape == view.length.shape
    for row, length in enumerate(view.length.tolist()):
        exact = Fraction(keep) * length
        wanted = {clamped(half_up(exact + nudge), view, row) for nudge in (0, Fraction(1, 10**8))}
        assert int(got[row]) in wanted


@pytest.mark.parametrize(
    ("keep", "length", "count"),
    [
        *[(0.5, 1, 1), (0.5, 2, 1), (0.5, 3, 2), (0.5, 5, 3), (0.5, 7, 4)],
        *[(0.29, 100, 29), (0.1, 3, 1), (0.1, 15, 2), (0.1, 25, 3), (0.35, 10, 4), (0.45, 10, 5), (0.15, 10, 2)],
        *[(1.0, 13, 13), (1, 13, 13), (1e-9, 40, 1), (0.999, 40, 40), (0.7, 45, 32)],
    ],
)
def test_ratio_rounds_to_the_nearest_and_halves_up(keep: float, length: int, count: int) -> None:
    assert Ratio(keep).count(TokenView(torch.zeros(1, length, 1)), None).tolist() == [count]


@prop(60)
@given(views(), shares)
def test_remaining_is_of_the_tokens_that_are_left(view: TokenView, share: float) -> None:
    got = Remaining(share).count(view, None)
    assert got.dtype == torch.long and got.shape == view.length.shape
    for row, left in enumerate(view.valid.sum(-1).tolist()):
        exact = Fraction(share) * left
        wanted = {clamped(half_up(exact + nudge), view, row) for nudge in (0, Fraction(1, 10**8))}
        assert int(got[row]) in wanted


def test_round_half_up_is_not_bankers_rounding() -> None:
    halves = torch.tensor([0.5, 1.5, 2.5, 3.5, 2.4999, 0.0], dtype=torch.float64)
    assert round_half_up(halves).tolist() == [1, 2, 3, 4, 2, 0]


@prop(50)
@given(views(), counts)
def test_count_is_exact_within_what_there_is(view: TokenView, tokens: int) -> None:
    got = Count(tokens).count(view, None)
    assert got.tolist() == [clamped(tokens, view, row) for row in range(len(view.valid))]


def entropy_wanted(p: list[float], length: int, budget: Entropy) -> float:
    effective = math.exp(-math.fsum(x * math.log(x) for x in p if x > 0))
    return min(max(budget.scale * effective, budget.low * length), budget.high * length)


@prop(80)
@given(
    views(),
    st.builds(Entropy, scale=st.floats(0.1, 3), low=st.floats(0.01, 0.3), high=st.floats(0.3, 1)),
    score_kinds,
    seeds,
)
def test_entropy_keeps_the_effective_number_of_tokens(view: TokenView, budget: Entropy, kind: str, seed: int) -> None:
    score = scores(view, kind, seed)
    got = budget.count(view, torch.where(view.valid, score, 1e9))
    for row in range(len(view.valid)):
        mass = score[row][view.valid[row]].double().tolist()
        total = math.fsum(mass)
        p = [m / total for m in mass] if total > 0 else [1 / len(mass)] * len(mass)
        wanted = entropy_wanted(p, int(view.length[row]), budget)
        near = {clamped(math.floor(wanted + 0.5 + nudge), view, row) for nudge in (-1e-7, 0, 1e-7)}
        assert int(got[row]) in near


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_entropy_of_a_flat_row_keeps_it_and_of_a_single_peak_one_token(n: int) -> None:
    view = TokenView(torch.zeros(2, n, 1))
    saliency = torch.stack([torch.ones(n), torch.eye(n)[n // 2]])
    assert Entropy(low=1e-6).count(view, saliency).tolist() == [n, 1]
    assert Entropy(scale=0.5, low=1e-6).count(view, saliency).tolist() == [(n + 1) // 2, 1]


def test_entropy_is_held_between_low_and_high() -> None:
    view = TokenView(torch.zeros(2, 40, 1))
    saliency = torch.stack([torch.ones(40), torch.eye(40)[3]])
    assert Entropy(low=0.2, high=0.6).count(view, saliency).tolist() == [24, 8]
    assert Entropy(low=0.5, high=0.5).count(view, saliency).tolist() == [20, 20]


@prop(60)
@given(views(merged=False), seeds, st.floats(0, 4), st.floats(0, 4), st.floats(0.2, 2))
def test_entropy_keeps_more_of_a_spread_saliency_than_of_a_peaked_one(
    view: TokenView, seed: int, a: float, b: float, scale: float
) -> None:
    logits = torch.randn(view.valid.shape, generator=generator(seed), dtype=torch.float64)
    budget = Entropy(scale=scale, low=0.01)
    spread, peaked = (budget.count(view, (cold * logits).exp()) for cold in sorted((a, b)))
    assert (spread >= peaked).all()


@prop(80)
@given(views(protect=("none",)), shares, score_kinds, seeds)
def test_mass_keeps_the_fewest_tokens_that_hold_it(view: TokenView, mass: float, kind: str, seed: int) -> None:
    score = scores(view, kind, seed)
    got = Mass(mass).count(view, torch.where(view.valid, score, 1e9))
    for row, count in enumerate(got.tolist()):
        ranked = sorted(score[row][view.valid[row]].double().tolist(), reverse=True)
        total = math.fsum(ranked)
        assert 1 <= count <= len(ranked)
        if total == 0:  # nothing to go by: every token counts the same
            ranked, total = [1.0] * len(ranked), float(len(ranked))
        assert math.fsum(ranked[:count]) >= mass * total - 1e-9 * total
        assert count == 1 or math.fsum(ranked[: count - 1]) < mass * total


@prop(60)
@given(views(merged=False), shares, score_kinds, seeds)
def test_what_mass_keeps_holds_it_beside_the_protected_tokens(
    view: TokenView, mass: float, kind: str, seed: int
) -> None:
    score = scores(view, kind, seed)
    chosen = select(score, Mass(mass).count(view, score), view)
    for row in range(len(view.valid)):
        total = float(score[row][view.valid[row]].double().sum())
        assert float(score[row][chosen[row]].double().sum()) >= mass * total - 1e-9 * total


@pytest.mark.parametrize(("mass", "count"), [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (1.0, 3)])
def test_mass_of_known_shares(mass: float, count: int) -> None:
    view = TokenView(torch.zeros(1, 4, 1))
    assert Mass(mass).count(view, torch.tensor([[1.0, 0.0, 2.0, 1.0]])).tolist() == [count]


@prop(60)
@given(views(), saliency_budgets, score_kinds, seeds, st.sampled_from((2.0**-40, 0.25, 8.0, 2.0**40)))
def test_saliency_counts_only_relatively(view: TokenView, budget: Budget, kind: str, seed: int, factor: float) -> None:
    score = scores(view, kind, seed)
    assert torch.equal(budget.count(view, score), budget.count(view, score * factor))


any_budget = st.one_of(plain_budgets, saliency_budgets).map(as_budget)


@prop(80)
@given(views(), any_budget, score_kinds, seeds, st.sampled_from(FLOATS))
def test_every_budget_lies_between_the_protected_and_the_valid_tokens(
    view: TokenView, budget: Budget, kind: str, seed: int, dtype: torch.dtype
) -> None:
    got = budget.count(view, scores(view, kind, seed).to(dtype))
    assert got.dtype == torch.long and got.shape == (len(view.valid),)
    assert (got >= (view.protected & view.valid).sum(-1)).all()
    assert (got >= 1).all() and (got <= view.valid.sum(-1)).all()


@prop(60)
@given(views(), any_budget, score_kinds, seeds)
def test_every_budget_answers_for_each_row_on_its_own(view: TokenView, budget: Budget, kind: str, seed: int) -> None:
    score = scores(view, kind, seed)
    got = budget.count(view, score)
    for row in range(len(view.valid)):
        one = budget.count(alone(view, row), score[row : row + 1, view.valid[row]])
        assert one.tolist() == [int(got[row])]


@prop(80)
@given(views(), counts, st.sampled_from(("random", "tied", "flat", "zeros")), seeds, st.sampled_from(FLOATS))
def test_select_takes_the_best_protected_first_and_the_earlier_of_equals(
    view: TokenView, tokens: int, kind: str, seed: int, dtype: torch.dtype
) -> None:
    count = Count(tokens).count(view, None)
    score = torch.where(view.valid, scores(view, kind, seed) - 1, 1e9).to(dtype)
    chosen = select(score, count, view)
    for row in range(len(view.valid)):
        ranked = sorted(
            view.valid[row].nonzero().flatten().tolist(),
            key=lambda i, row=row: (not view.protected[row, i], -float(score[row, i]), i),
        )
        assert chosen[row].nonzero().flatten().tolist() == sorted(ranked[: int(count[row])])


def test_select_meets_the_count_among_scores_of_minus_infinity() -> None:
    view = TokenView(torch.zeros(1, 4, 1), valid=torch.tensor([[False, True, True, True]]))
    chosen = select(torch.full((1, 4), -torch.inf), torch.tensor([2]), view)
    assert chosen.tolist() == [[False, True, True, False]]


def test_select_puts_protected_tokens_before_scores_of_infinity() -> None:
    view = TokenView(torch.zeros(1, 3, 1), protected=torch.tensor([[False, False, True]]))
    chosen = select(torch.tensor([[torch.inf, 1.0, 0.0]]), torch.tensor([1]), view)
    assert chosen.tolist() == [[False, False, True]]


# Bad input


@pytest.mark.parametrize("value", [0, -0.1, 1.0001, math.nan, math.inf, "0.5", None])
@pytest.mark.parametrize(("make", "name"), [(Ratio, "keep"), (Remaining, "share"), (Mass, "mass")])
def test_a_share_outside_its_range_is_refused(make: Any, name: str, value: Any) -> None:
    with pytest.raises(ValueError) as error:
        make(value)
    assert str(error.value) == f"{name} must be a number in (0, 1], got {value!r}"


@pytest.mark.parametrize("value", [0, -3, 2.0, True, "5", None])
def test_a_count_that_is_no_positive_whole_number_is_refused(value: Any) -> None:
    with pytest.raises(ValueError) as error:
        Count(value)
    assert str(error.value) == f"tokens must be a whole number of at least 1, got {value!r}"


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        ({"scale": 0}, "scale must be a positive number, got 0"),
        ({"scale": -1.5}, "scale must be a positive number, got -1.5"),
        ({"scale": math.inf}, "scale must be a positive number, got inf"),
        ({"scale": "1"}, "scale must be a positive number, got '1'"),
        ({"low": 0}, "low must be a number in (0, 1], got 0"),
        ({"high": 1.5}, "high must be a number in (0, 1], got 1.5"),
        ({"low": 0.6, "high": 0.5}, "low must not exceed high, got low=0.6 and high=0.5"),
    ],
)
def test_entropy_refuses_settings_out_of_range(given_: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        Entropy(**given_)
    assert str(error.value) == message


@pytest.mark.parametrize("budget", [Entropy(), Mass(0.5)])
def test_a_budget_that_needs_a_saliency_says_so(budget: Budget) -> None:
    name = type(budget).__name__
    with pytest.raises(ValueError, match=f"budget {name} needs a saliency.*use a ratio or a count"):
        budget.count(TokenView(torch.zeros(1, 2, 1)), None)


def test_as_budget() -> None:
    assert as_budget(0.25) == Ratio(0.25) and as_budget(1) == Ratio(1.0)
    for budget in (Ratio(0.3), Count(5), Entropy(), Mass(0.9)):
        assert as_budget(budget) is budget


@pytest.mark.parametrize("value", [None, True, {"keep": 0.5}, "0.5", [0.5], (0.5,), Ratio], ids=repr)
def test_as_budget_refuses_everything_else(value: Any) -> None:
    with pytest.raises(ValueError) as error:
        as_budget(value)
    assert str(error.value).startswith("keep must be a number in (0, 1] or a budget")
    assert str(error.value).endswith(f"got {value!r}")


@pytest.mark.parametrize("value", [0, 1.5, math.nan])
def test_as_budget_refuses_a_number_out_of_range(value: float) -> None:
    with pytest.raises(ValueError, match=r"keep must be a number in \(0, 1\], got"):
        as_budget(value)


@prop(40)
@given(prefix_views(), counts)
def test_a_count_behind_a_prefix_is_known_beforehand(view: TokenView, tokens: int) -> None:
    got = fixed_count(Count(tokens), view)
    assert isinstance(got, int) and Count(tokens).count(view, None).tolist() == [got] * len(view.hidden)
    assert fixed_count(Count(tokens), as_masks(view)) is None
    for budget in (Ratio(0.5), Entropy(), Mass(0.5), Remaining(0.5)):
        assert fixed_count(budget, view) is None


@prop(60)
@given(st.integers(1, 30), st.sampled_from(PREFIXES), seeds, st.sampled_from(("tied", "normal", "twins", "zeros")))
def test_the_lowest_go_and_of_equal_ones_the_later(patches: int, prefix: int, seed: int, kind: str) -> None:
    n, rng = patches + prefix, generator(seed)
    score = torch.randn(2, n, generator=rng)
    score = score.round() if kind == "tied" else torch.zeros_like(score) if kind == "zeros" else score
    for remove in {0, 1, patches // 2, patches}:
        got = lowest(score, remove, prefix)
        for row in range(2):
            order = sorted(range(prefix, n), key=lambda i: (float(score[row, i]), -i))
            assert got[row].tolist() == sorted(order[:remove])
        # what is left is what a budget would have kept
        view = TokenView(torch.zeros(2, n, 1), prefix=prefix)
        kept = select(score, torch.full((2,), n - remove), view)
        assert torch.equal(kept, torch.ones(2, n, dtype=torch.bool).scatter(1, got, False))


all_budgets = plain_budgets | shares.map(Remaining) | saliency_budgets


@prop(120)
@given(views(exempt=True), all_budgets, score_kinds, seeds)
def test_exempt_tokens_come_on_top_of_any_budget(view: TokenView, keep: Any, kind: str, seed: int) -> None:
    """The others are given what they would be given alone, however many tokens are exempt, and whatever they score."""
    budget, score = as_budget(keep), scores(view, kind, seed)
    noisy = torch.where(view.counted, score, torch.rand(score.shape, generator=generator(seed)) * 1e6)
    for row, count in enumerate(budget.count(view, noisy).tolist()):
        others = view.counted[row]
        want = int(budget.count(without_exempt(view, row), score[row, others][None])) if bool(others.any()) else 0
        assert count == want + int((view.valid & ~view.counted)[row].sum())


def test_a_budget_of_known_exempt_tokens() -> None:
    """300 protected tokens in front of 100: the 100 are cut to 40, of which 4 and 16 are there in any case."""
    protected = torch.zeros(1, 400, dtype=torch.bool)
    protected[:, :304], protected[:, -16:] = True, True
    exempt = torch.arange(400)[None] < 300
    view = TokenView(torch.zeros(1, 400, 1), protected=protected, exempt=exempt)
    assert Ratio(0.4).count(view, None).tolist() == [340]
    assert Count(50).count(view, None).tolist() == [350]
    assert Count(1).count(view, None).tolist() == [320]
    assert Remaining(0.5).count(view, None).tolist() == [350]
    assert Entropy().count(view, torch.ones(1, 400)).tolist() == [400]
    assert Mass(0.3).count(view, torch.ones(1, 400)).tolist() == [330]


@pytest.mark.parametrize("large", [3e38, float(torch.finfo(torch.float64).max)])
def test_no_saliency_is_too_large_or_too_small_to_share(large: float) -> None:
    view = TokenView(torch.zeros(1, 4, 1))
    for scale in (large, 1e-300):
        saliency = torch.tensor([[1.0, 1.0, 1.0, 1.0]], dtype=torch.float64) * scale
        assert Entropy().count(view, saliency).tolist() == [4]
        assert Mass(0.5).count(view, saliency).tolist() == [2]


@prop(60)
@given(
    st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8), st.floats(0.05, 1.0), st.sampled_from((0.05, 0.02)),
)  # fmt: skip
def test_a_calibrated_entropy_budget_keeps_its_share_on_average(spread: list[float], share: float, low: float) -> None:
    budget = Entropy.calibrated(share, spread, low)
    kept = [min(1.0, max(low, budget.scale * each)) for each in spread]
    assert math.fsum(kept) / len(kept) == pytest.approx(share, rel=1e-9)
    assert budget == Entropy(budget.scale, low)


@prop(40)
@given(views(), seeds)
def test_effective_tokens_are_the_exponential_of_the_entropy(view: TokenView, seed: int) -> None:
    saliency = torch.rand(view.valid.shape, generator=generator(seed), dtype=torch.float64)
    found = effective_tokens(view, saliency)
    for row in range(len(view.valid)):
        mass = saliency[row, view.valid[row]].tolist()
        total = math.fsum(mass)
        want = math.exp(-math.fsum(x / total * math.log(x / total) for x in mass if x > 0)) if total else len(mass)
        assert float(found[row]) == pytest.approx(want, rel=1e-9)
        assert 1 - 1e-9 <= float(found[row]) <= len(mass) + 1e-9


@pytest.mark.parametrize(
    ("given_share", "spread", "message"),
    [
        (0.01, [0.5], "share must lie between low=0.05 and high=1.0, got 0.01"),
        (1.5, [0.5], r"share must be a number in \(0, 1\], got 1.5"),
        (0.4, [], r"spread must be positive numbers, one at least, got \[\]"),
        (0.4, [0.5, -1.0], "spread must be positive numbers, one at least, got"),
    ],
)
def test_what_a_budget_can_not_be_calibrated_by_is_named(given_share: float, spread: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Entropy.calibrated(given_share, spread)
