"""Greedy coverage and dispersion against literal loops and against all subsets."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import combinations
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import FLOATS, KINDS, generator, numbers, prop, seeds, up_to
from torch import Tensor

from quickmerge.merge.tokens import TokenView
from quickmerge.merge.tokens.selection import PIECE, Selection, cover, disperse, keep_only, similarity, unit

LAZY = pytest.mark.parametrize("lazy", [False, True])
OBJECTIVE = pytest.mark.parametrize("objective", ["sum", "min"])


def cosines(x: Tensor) -> list[list[float]]:
    """Of every pair of rows of ``(N, D)``, 0 where either is zero."""
    rows = x.double().tolist()
    length = [math.sqrt(math.fsum(a * a for a in row)) for row in rows]

    def cosine(i: int, j: int) -> float:
        dot = math.fsum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        if i == j:
            return 1.0 if length[i] else 0.0
        return dot / (length[i] * length[j]) if length[i] and length[j] else 0.0

    return [[cosine(i, j) for j in range(len(rows))] for i in range(len(rows))]


def slow_cover(x: Tensor, count: int, saliency: list[float], alpha: float) -> list[int]:
    """SCOPE as the paper writes it: the whole gain of every token in every step.

    Of the last two that are worth anything, each gains from itself and the other what the other does: a tie, if
    differences and sums are exact.
    """
    similar, chosen = [[Fraction(s) for s in row] for row in cosines(x)], []
    n = len(similar)
    for _ in range(min(count, n)):
        best, pick = -math.inf, -1
        for j in range(n):
            if j in chosen:
                continue
            gain = sum(
                max(Fraction(0), similar[i][j] - max([Fraction(0), *(similar[i][k] for k in chosen)])) for i in range(n)
            )
            score = gain * Fraction(saliency[j] ** alpha)
            if score > best:
                best, pick = score, j
        chosen.append(pick)
    return chosen


def slow_disperse(x: Tensor, count: int, objective: str) -> list[int]:
    """The average (or the largest) cosine with all that were chosen, anew in every step."""
    similar, chosen = cosines(x), []
    n = len(similar)
    for _ in range(min(count, n)):
        near = {}
        for i in set(range(n)) - set(chosen):
            with_ = [similar[i][j] for j in (chosen or range(n))]
            near[i] = max(with_) if objective == "min" and chosen else math.fsum(with_) / len(with_)
        chosen.append(min(near, key=lambda i: (near[i], i)))
    return chosen


def clustered(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Tokens around a few centres, as those of images are."""
    *batch, n, d = shape
    centres = torch.randn(*batch, 4, d, generator=draws, dtype=torch.float64)
    which = torch.randint(4, (n,), generator=draws)
    return centres[..., which, :] + 0.5 * torch.randn(shape, generator=draws, dtype=torch.float64)


def exact_units(shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Vectors in four dimensions whose cosines are whole halves, without rounding: many ties. Some are zero."""
    signs = torch.randint(0, 2, (*shape, 4), generator=draws) * 2.0 - 1
    axes = torch.nn.functional.one_hot(torch.randint(0, 4, shape, generator=draws), 4) * 2.0
    kind = torch.randint(0, 5, (*shape, 1), generator=draws)
    return torch.where(kind == 0, 0.0, torch.where(kind < 3, axes, signs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cover_is_the_literal_loop(dtype: torch.dtype) -> None:
    """200 random batches, the naive and the lazy way."""
    for seed in range(200):
        rng, draws = Random(seed), generator(seed)
        b, n, d = rng.randint(1, 2), rng.randint(1, 14), rng.choice((2, 3, 8))
        x = clustered((b, n, d), draws).to(dtype)
        saliency = torch.rand(b, n, generator=draws, dtype=torch.float64) + 0.01
        alpha, count = rng.choice((0.0, 0.5, 1.0, 2.0)), rng.randint(1, 8)
        want = [slow_cover(x[row], count, saliency[row].tolist(), alpha) for row in range(b)]
        for lazy in (False, True):
            got = cover(x, count, saliency, alpha, lazy=lazy)
            assert got.order.tolist() == want
            assert got.index.tolist() == [sorted(row) for row in want]
            assert [row.nonzero().flatten().tolist() for row in got.mask] == [sorted(row) for row in want]


@OBJECTIVE
def test_disperse_is_the_literal_loop(objective: str) -> None:
    """With few picks of many tokens, which are compared one by one, and with many, for which all pairs are."""
    for seed in range(150):
        rng, draws = Random(seed), generator(seed)
        b, n = rng.randint(1, 2), rng.choice((1, *range(3, 21)))  # of two, both are as near the mean: a tie
        x = clustered((b, n, rng.choice((3, 8))), draws)
        count = rng.choice((1, 2, rng.randint(1, n + 2)))
        got = disperse(x, count, objective=objective)
        assert got.order.tolist() == [slow_disperse(x[row], count, objective) for row in range(b)]


@LAZY
@prop(60)
@given(n=up_to(12), count=st.integers(1, 14), seed=seeds)
def test_ties_go_to_the_earlier_token(lazy: bool, n: int, count: int, seed: int) -> None:
    """Gains that are equal to the bit, and saliencies that are; and zero tokens, which gain nothing."""
    draws = generator(seed)
    x = exact_units((n,), draws)
    saliency = torch.randint(0, 3, (1, n), generator=draws).double()
    for a in (saliency, torch.ones(1, n)):
        weight = a[0].tolist() if a.any() else [1.0] * n
        assert cover(x[None], count, a, lazy=lazy).order[0].tolist() == slow_cover(x, count, weight, 1.0)
    for objective in ("sum", "min"):
        assert disperse(x[None], count, objective=objective).order[0].tolist() == slow_disperse(x, count, objective)


@prop(80)
@given(data=st.data(), batch=up_to(3), n=up_to(120), seed=seeds)
def test_lazy_gives_the_order_of_naive(data: st.DataObject, batch: int, n: int, seed: int) -> None:
    """Whatever the tokens hold, ties and twins and zeros among them, and for rows of different lengths."""
    draws = generator(seed)
    x = numbers((batch, n, data.draw(st.sampled_from((1, 3, 9)))), data.draw(st.sampled_from(KINDS)), draws)
    x = x.to(data.draw(st.sampled_from(FLOATS)))
    saliency = torch.rand(batch, n, generator=draws).round(decimals=data.draw(st.integers(0, 4)))
    open_ = torch.rand(batch, n, generator=draws) < data.draw(st.sampled_from((0.3, 1.0)))
    count = torch.randint(0, n + 2, (batch,), generator=draws)
    alpha = data.draw(st.sampled_from((0.0, 0.7, 1.0, 3.0)))
    one, two = (cover(x, count, saliency, alpha, open_, lazy) for lazy in (False, True))
    assert torch.equal(one.order, two.order)
    assert (one.order >= 0).sum(-1).tolist() == torch.minimum(count, open_.sum(-1)).tolist()


def test_lazy_gives_the_order_of_naive_over_several_pieces() -> None:
    """More tokens than are summed at once, all alike: the sums are near the largest that there can be."""
    n = 2 * PIECE + 5
    x = (torch.randn(1, 1, 3, generator=generator(0)) + 0.01 * torch.randn(1, n, 3, generator=generator(1))).abs()
    one, two = (cover(x, 6, lazy=lazy) for lazy in (False, True))
    assert torch.equal(one.order, two.order)
    similar = (unit(x[0].double()) @ unit(x.double())[0].T).clamp(0, 1)
    total = similar.sum(-1)
    assert float(total[one.order[0, 0]]) >= float(total.max()) - n * 2**-20


@prop(40)
@given(data=st.data(), batch=up_to(3), n=up_to(20), seed=seeds)
def test_closed_tokens_are_as_if_they_were_not_there(data: st.DataObject, batch: int, n: int, seed: int) -> None:
    """And a row chooses what it would alone, with a count of its own."""
    draws = generator(seed)
    x = numbers((batch, n, 5), "normal", draws, torch.float64)
    saliency = torch.rand(batch, n, generator=draws, dtype=torch.float64)
    open_ = torch.rand(batch, n, generator=draws) < 0.6
    counts = torch.randint(0, n + 2, (batch,), generator=draws)
    x = torch.where(open_[..., None], x, 1e300)
    saliency = torch.where(open_, saliency, math.nan)
    lazy = data.draw(st.booleans())
    batched = [cover(x, counts, saliency, 1.0, open_, lazy), *(disperse(x, counts, open_, o) for o in ("sum", "min"))]
    for row in range(batch):
        there = open_[row].nonzero().flatten()
        own, count = x[row, there][None], int(counts[row])
        alone = [
            cover(own, count, saliency[row, there][None]),
            *(disperse(own, count, None, o) for o in ("sum", "min")),
        ]
        for got, want in zip(batched, alone, strict=True):
            order = got.order[row][got.order[row] >= 0].tolist()
            assert order == there[want.order[0]].tolist() and len(order) == min(count, len(there))
            assert got.order[row, len(order) :].tolist() == [-1] * (got.order.shape[1] - len(order))
            assert got.index[row].tolist() == sorted(order) + [-1] * (got.order.shape[1] - len(order))
            assert got.mask[row].nonzero().flatten().tolist() == sorted(order)


def test_a_count_beyond_all_tokens_chooses_them_all_once() -> None:
    x = torch.randn(2, 8, 3, generator=generator(0))
    for got in (cover(x, 12), cover(x, 12, lazy=True), disperse(x, 12), disperse(x, torch.tensor([12, 9]))):
        assert got.mask.all() and got.index.tolist() == [list(range(8))] * 2
    for got in (cover(x, 0), cover(x, torch.tensor([0, 0]), lazy=True), disperse(x, 0)):
        assert got.order.shape == (2, 0) and not got.mask.any() and got.index.shape == (2, 0)


def test_zero_tokens_come_last_and_in_order() -> None:
    x = torch.zeros(1, 6, 3)
    x[0, 4, 0], x[0, 2, 1] = 1e-30, 1e30  # no square of either is a float32
    for lazy in (False, True):
        assert cover(x, 6, lazy=lazy).order.tolist() == [[2, 4, 0, 1, 3, 5]]
    assert cover(x, 6, torch.tensor([[1.0, 1, 1, 1, 5, 1]])).order.tolist() == [[4, 2, 0, 1, 3, 5]]


def test_saliency_counts_relatively() -> None:
    """Neither its scale nor a large power makes it vanish; where it is zero throughout it does not count."""
    x = torch.randn(1, 30, 8, generator=generator(0))
    a = torch.rand(1, 30, generator=generator(1))
    assert torch.equal(cover(x, 9, a).order, cover(x, 9, a * 1e-30).order)
    assert torch.equal(cover(x, 9, torch.zeros(1, 30)).order, cover(x, 9).order)
    assert torch.equal(cover(x, 9, a, alpha=0.0).order, cover(x, 9).order)
    assert int(cover(x, 1, a * 1e-5, alpha=200.0).order) == int(a.argmax())
    assert not torch.equal(cover(x, 9, a).order, cover(x, 9).order)


def covered(similar: Tensor, chosen: list[int] | tuple[int, ...]) -> float:
    return float(similar[:, list(chosen)].clamp_min(0).amax(-1).sum())


def test_coverage_against_all_subsets() -> None:
    """Without a saliency at least 1 - 1/e of the best, and it never falls."""
    for seed in range(20):
        x = clustered((1, 12, 3), generator(seed))
        similar = unit(x)[0] @ unit(x)[0].T
        order = cover(x, 4).order[0].tolist()
        best = max(covered(similar, subset) for subset in combinations(range(12), 4))
        assert (1 - 1 / math.e) * best <= covered(similar, order) <= best + 1e-9
        steps = [covered(similar, order[: k + 1]) for k in range(4)]
        assert steps == sorted(steps)


def test_dispersion_against_all_subsets() -> None:
    """Max-sum: far above what is proved (1/2 for a metric). Max-min: half of the best Euclidean distance at least."""
    share = []
    subsets = torch.tensor(list(combinations(range(14), 5)))
    for seed in range(20):
        x = torch.randn(1, 14, 6, generator=generator(seed), dtype=torch.float64)
        far = 1 - unit(x)[0] @ unit(x)[0].T
        pairs = far[subsets[:, :, None], subsets[:, None]]
        apart = pairs + 9 * torch.eye(5, dtype=torch.float64)
        one, two = (disperse(x, 5, objective=o).order[0] for o in ("sum", "min"))
        share.append(float(far[one][:, one].sum() / pairs.sum((1, 2)).max()))
        # 2 (1 - cos) is the square of the Euclidean distance, which is a metric, so 1/2 there is 1/4 here
        least = (far[two][:, two] + 9 * torch.eye(5, dtype=torch.float64)).min()
        assert 1 / 4 * float(apart.amin((1, 2)).max()) <= float(least)
    assert max(share) <= 1 + 1e-9 and min(share) > 0.9 and sum(share) / len(share) > 0.96


@prop(30)
@given(n=up_to(15), seed=seeds)
def test_the_order_of_the_tokens_does_not_matter(n: int, seed: int) -> None:
    draws = generator(seed)
    x, a = clustered((1, n, 6), draws), torch.rand(1, n, generator=draws, dtype=torch.float64)
    shuffle = torch.randperm(n, generator=draws)
    for one, two in (
        (cover(x, 5, a), cover(x[:, shuffle], 5, a[:, shuffle])),
        (disperse(x, 5), disperse(x[:, shuffle], 5)),
    ):
        assert torch.equal(one.order, shuffle[two.order])


@prop(30)
@given(n=st.integers(2, 12), seed=seeds)
def test_a_copy_of_what_is_chosen_comes_after_all_that_is_new(n: int, seed: int) -> None:
    """It gains nothing, and nothing is nearer."""
    x = torch.eye(n, dtype=torch.float64)[None]
    which = torch.randperm(n, generator=generator(seed))
    twins = torch.cat([x, x[:, which]], 1)
    for got in (cover(twins, n), cover(twins, n, lazy=True), disperse(twins, n), disperse(twins, n, None, "min")):
        assert got.mask[0, :n].all() and not got.mask[0, n:].any()


def test_half_precision_is_compared_in_single() -> None:
    x = clustered((2, 60, 16), generator(3)).bfloat16()
    a = torch.rand(2, 60, generator=generator(4)).bfloat16()
    assert torch.equal(cover(x, 20, a).order, cover(x.float(), 20, a.float()).order)
    assert torch.equal(disperse(x, 20).order, disperse(x.float(), 20).order)


def test_similarities_are_whole_units_and_nothing_flows_back() -> None:
    x = torch.randn(2, 7, 4, generator=generator(0), requires_grad=True)
    for dtype, whole, bits in ((torch.float32, torch.int32, 20), (torch.float64, torch.int64, 40)):
        length1 = unit(x.to(dtype))
        similar = similarity(length1)
        assert similar.dtype == whole and not length1.requires_grad
        want = (length1 @ length1.mT).clamp(0, 1)
        assert (similar.double() / 2**bits - want.double()).abs().max() <= 0.5 / 2**bits + 1e-7
        assert (similar.diagonal(dim1=1, dim2=2) == 2**bits).all()


def test_keeping_only_what_was_chosen() -> None:
    hidden = torch.randn(2, 6, 3, generator=generator(0))
    everywhere = Selection(torch.tensor([[5, 0, 2], [0, 4, 3]]), 6)
    behind = Selection(torch.tensor([[4, 1], [3, 2]]), 5)
    plain, shaped = TokenView(hidden), TokenView(hidden, prefix=1)
    for view, chosen, left, order in (
        (plain, everywhere, None, [[5, 0, 2], [0, 4, 3]]),
        (plain, everywhere, 3, [[5, 0, 2], [0, 4, 3]]),
        (shaped, behind, 3, [[5, 2], [4, 3]]),
    ):
        plan = keep_only(view, chosen, left)
        plan.check(view)
        assert plan.position.tolist() == [[0, 2, 5], [0, 3, 4]]
        assert (plan.seat is not None) == (view is shaped)
        assert plan.order is not None and plan.order.tolist() == order
    valid = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6]).bool()
    chosen = Selection(torch.tensor([[2, 0, 1, -1, -1, -1], [3, 5, 0, 1, 2, 4]]), 6)
    plan = keep_only(TokenView(hidden, valid=valid), chosen)
    assert plan.valid.sum(-1).tolist() == [3, 6] and torch.equal(plan.order, chosen.order)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(1, 3, 2)
    for bad in (-1, 1.5, True):
        for call in (cover, disperse):
            with pytest.raises(ValueError, match=f"count must be a whole number of at least 0, got {bad}"):
                call(x, bad)
    with pytest.raises(ValueError, match="objective must be one of sum, min, got 'max'"):
        disperse(x, 1, objective="max")
    for alpha in (-1.0, math.nan):
        with pytest.raises(ValueError, match=f"alpha must be a number of at least 0, got {alpha}"):
            cover(x, 1, torch.ones(1, 3), alpha)


def test_a_selection_is_told_in_both_orders() -> None:
    got = Selection(torch.tensor([[4, 0, -1], [2, 1, 3]]), 5)
    assert got.index.tolist() == [[0, 4, -1], [1, 2, 3]]
    assert got.mask.tolist() == [[True, False, False, False, True], [False, True, True, True, False]]
