"""GridMerge against a literal float64 statement, and the laws of a plan over grids."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    alone,
    assert_same_plan,
    assert_same_row,
    padded,
    plain_budgets,
    prop,
    saliency_budgets,
    seeds,
    told,
    views,
)

from quickmerge.merge.reducers.pooling import GridMerge, lattice
from quickmerge.merge.tokens import Count, MergePlan, TokenView, as_budget


def with_grid(view: TokenView, seed: int) -> TokenView:
    """The view on a random grid that all of its positions lie in."""
    least = int(view.position[view.valid].max()) + 1
    rng = Random(seed)
    t = rng.choice((1, 1, 2, 3))
    h = rng.randint(1, 7)
    return replace(view, grid=(t, h, -(-least // (t * h)) + rng.randint(0, 1)))


def gridded(**more) -> st.SearchStrategy[TokenView]:
    return st.builds(with_grid, views(**more), seeds)


def around(cell: tuple[int, ...], grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    spans = [range(max(0, at - 1), min(length, at + 2)) for at, length in zip(cell, grid, strict=True)]
    return [other for other in itertools.product(*spans) if other != cell]


def slow_saliency(view: TokenView, row: int) -> dict[int, float]:
    """By token, one neighbour at a time."""
    t, h, w = view.grid
    standing = {}
    for i in view.valid[row].nonzero().flatten().tolist():
        p = int(view.position[row, i])
        standing[p // (h * w), p // w % h, p % w] = i
    found = {}
    for cell, i in standing.items():
        near = [view.hidden[row, standing[other]].double() for other in around(cell, (t, h, w)) if other in standing]
        mean = sum(near) / len(near) if near else view.hidden[row, i].double()
        found[i] = float((view.hidden[row, i].double() - mean).square().sum().sqrt())
    return found


def slow_plan(view: TokenView, row: int, count: int, coverage: float, similarity: float) -> dict[int, list[int]]:
    """One row: the members of every anchor, by token."""
    t, h, w = view.grid
    there = view.valid[row].nonzero().flatten().tolist()
    fixed = [i for i in there if bool(view.protected[row, i])]
    cells = lattice(math.floor((count - len(fixed)) * coverage + 1e-9), (t, h, w))
    even = [i for i in there if i not in fixed and int(view.position[row, i]) in cells]
    saliency = slow_saliency(view, row)
    rest = sorted((i for i in there if i not in fixed and i not in even), key=lambda i: (-saliency[i], i))
    anchors = sorted((fixed + even + rest)[:count])
    x = view.hidden[row].double()
    mean = sum(x[i] for i in there) / len(there)
    scale = sum(float((x[i] - mean).square().sum()) for i in there) / len(there) or 1.0
    groups = {i: [i] for i in anchors}
    takers = [i for i in anchors if i not in fixed]

    def cost(i: int, a: int) -> float:
        p, q = int(view.position[row, i]), int(view.position[row, a])
        steps = (p // (h * w) - q // (h * w), p // w % h - q // w % h, p % w - q % w)
        return round(1024 * (sum(s * s for s in steps) + similarity * float((x[i] - x[a]).square().sum()) / scale))

    for i in there:
        if i not in groups and takers:
            groups[min(takers, key=lambda a: (cost(i, a), a))].append(i)
    return groups


@prop(80)
@given(
    gridded(dtypes=(torch.float64,), kinds=("normal", "zeros"), max_tokens=30),
    plain_budgets | saliency_budgets,
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([0.0, 1.0, 8.0]),
)
def test_equals_a_slow_statement(view: TokenView, keep, coverage: float, similarity: float) -> None:
    reducer = GridMerge(keep=keep, coverage=coverage, similarity=similarity)
    saliency = reducer.saliency(view)
    plan = reducer.plan(view)
    counts = as_budget(keep).count(view, saliency)
    for row in range(len(view.valid)):
        for i, value in slow_saliency(view, row).items():
            assert float(saliency[row, i]) == pytest.approx(value, rel=1e-9, abs=1e-12)
        groups = slow_plan(view, row, int(counts[row]), coverage, similarity)
        slots = plan.valid[row].nonzero().flatten().tolist()
        assert len(slots) == int(counts[row])
        for slot, (anchor, members) in zip(slots, groups.items(), strict=True):
            assert int(plan.position[row, slot]) == int(view.position[row, anchor])
            assert (plan.slot[row] == slot).nonzero().flatten().tolist() == sorted(members)
            total = sum(int(view.size[row, i]) for i in members)
            for i in members:
                assert float(plan.weight[row, i]) == pytest.approx(int(view.size[row, i]) / total, rel=1e-6)


@prop(150)
@given(gridded(), plain_budgets | saliency_budgets, st.floats(0, 1), st.floats(0, 50))
def test_plans_are_lawful_and_meet_the_budget(view: TokenView, keep, coverage: float, similarity: float) -> None:
    reducer = GridMerge(keep=keep, coverage=coverage, similarity=similarity)
    plan = reducer.plan(view)
    plan.check(view)
    assert torch.equal(plan.valid.sum(-1), as_budget(keep).count(view, reducer.saliency(view)))
    # nothing is dropped, unless only protected patches are kept
    free = (plan.carry(view.free) & plan.valid).any(-1)
    assert torch.equal((plan.slot >= 0)[free], view.valid[free])


@prop(60)
@given(gridded(kinds=("normal", "twins", "zeros")), plain_budgets, seeds)
def test_rows_do_not_depend_on_batch_mates_or_padding(view: TokenView, keep, seed: int) -> None:
    reducer = GridMerge(keep=keep)
    plan = reducer.plan(view)
    assert_same_plan(reducer.plan(view), plan)
    wide = replace(padded(view, 2, 3, seed), grid=view.grid)
    both = reducer.plan(wide)
    for row in range(len(view.valid)):
        one = replace(alone(view, row), grid=view.grid)
        assert_same_row(told(plan, view, row), told(reducer.plan(one), one, 0))
        assert_same_row(told(both, wide, row), told(plan, view, row))


@prop(60)
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.data())
def test_the_lattice_is_even(t: int, h: int, w: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, t * h * w))
    found = lattice(count, (t, h, w))
    assert len(found) == len(set(found)) == count and found == sorted(found)
    assert all(0 <= cell < t * h * w for cell in found)


def test_known_lattices() -> None:
    assert lattice(4, (1, 4, 4)) == [5, 7, 13, 15]
    assert lattice(8, (4, 4, 4)) == [21, 23, 29, 31, 53, 55, 61, 63]
    assert lattice(1, (1, 3, 5)) == [7]
    assert lattice(3, (1, 1, 9)) == [1, 4, 7]


def test_no_region_is_left_empty() -> None:
    """All that stands out is in one corner; the lattice still sees to the others."""
    hidden = torch.zeros(1, 64, 3)
    hidden[0, [0, 1, 2, 8, 9, 10, 16, 17, 18]] = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    view = TokenView(hidden, grid=(1, 8, 8))

    def quarters(coverage: float) -> set[tuple[int, int]]:
        plan = GridMerge(keep=Count(8), coverage=coverage).plan(view)
        return {(p // 8 // 4, p % 8 // 4) for p in plan.position[0].tolist()}

    assert quarters(0.5) == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert quarters(0.0) == {(0, 0)}


def test_merging_like_with_like_copies_back_better() -> None:
    """Two flat halves and one odd patch: places alone cannot tell them apart, features can."""
    hidden = torch.zeros(1, 36, 2, dtype=torch.float64)
    hidden.view(6, 6, 2)[:, 3:, 0] = 1
    hidden[0, 20, 1] = 5
    view = TokenView(hidden, grid=(1, 6, 6))

    def error(similarity: float) -> float:
        plan = GridMerge(keep=Count(9), similarity=similarity).plan(view)
        return float((plan.unmerge(plan.merge(hidden)) - hidden).square().sum())

    assert error(8.0) == pytest.approx(0, abs=1e-12) and error(0.0) > 0.5


def test_patches_of_one_colour_merge_by_place_alone() -> None:
    """Their mean is not quite their colour in float32, and the rest must not be taken for a difference."""
    flat = TokenView(torch.full((1, 49, 3), 0.1), grid=(1, 7, 7))
    zero = TokenView(torch.zeros(1, 49, 3), grid=(1, 7, 7))
    assert_same_plan(GridMerge(keep=0.3).plan(flat), GridMerge(keep=0.3).plan(zero))


def test_frames_take_part_in_the_neighbourhood() -> None:
    hidden = torch.zeros(1, 27, 1)
    hidden[0, 13] = 26.0
    video, image = TokenView(hidden, grid=(3, 3, 3)), TokenView(hidden, grid=(1, 9, 3))
    assert GridMerge().saliency(video)[0].tolist() == pytest.approx(
        [26 / (len(around((i // 9, i // 3 % 3, i % 3), (3, 3, 3)))) if i != 13 else 26.0 for i in range(27)]
    )
    assert int((GridMerge().saliency(image)[0] > 0).sum()) == 9


def test_keeping_everything_changes_nothing() -> None:
    view = TokenView(torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(0)), grid=(1, 3, 4))
    assert GridMerge(keep=1.0).plan(view).is_identity(view)
    assert_same_plan(GridMerge(keep=1.0).plan(view), MergePlan.identity(view))


def test_merging_twice_finds_patches_by_their_position() -> None:
    view = TokenView(torch.randn(1, 48, 3, generator=torch.Generator().manual_seed(1)), grid=(3, 4, 4))
    first = GridMerge(keep=0.5).plan(view)
    after = TokenView(
        first.merge(view.hidden), position=first.position, size=first.size, length=view.length, grid=view.grid
    )
    second = GridMerge(keep=0.25).plan(after)
    second.check(after)
    both = first.compose(second)
    both.check(view)
    # by size, so that two merges are the plain mean of the patches too
    for k in range(both.slots):
        members = view.hidden[0, both.slot[0] == k]
        torch.testing.assert_close(both.merge(view.hidden)[0, k], members.mean(0))


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (None, r"grid must be \(T, H, W\).* got none"),
        ((1, 4), r"grid must be three whole numbers \(T, H, W\) of at least 1, got \(1, 4\)"),
        ((1, 0, 4), "of at least 1"),
        ((1, 2, 4), r"position must lie in 0\.\.7, inside the grid \(1, 2, 4\), got 8"),
    ],
)
def test_a_view_without_a_fitting_grid_is_refused(grid, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridMerge().plan(TokenView(torch.zeros(1, 12, 3), grid=grid))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("coverage", 1.5, r"coverage must be a number in \[0, 1\], got 1.5"),
        ("coverage", True, "coverage must be a number"),
        ("similarity", -1, "similarity must be a number of at least 0, got -1"),
        ("similarity", math.inf, "similarity must be a number of at least 0, got inf"),
    ],
)
def test_settings_are_checked(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GridMerge(**{name: value})
