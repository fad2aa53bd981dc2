"""Pool against a literal statement, and the blocks of average pooling where the grid divides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import as_masks, make, prefix_views, ragged
from strategies import prop, seeds

from quickmerge.merge.reducers import Pool
from quickmerge.merge.reducers.pooling import lattice
from quickmerge.merge.tokens import Count, TokenView


def place(cell: int, grid: tuple[int, int, int]) -> tuple[int, int, int]:
    _, h, w = grid
    return cell // (h * w), cell // w % h, cell % w


def slow_pool(cells: list[int], grid: tuple[int, int, int], keep: int) -> dict[int, list[int]]:
    """By the cell that stays, the cells that it takes."""
    on = lattice(keep, grid)
    empty = [place(c, grid) for c in on if c not in cells]

    def wanted(cell: int) -> tuple[float, int]:
        if cell in on:
            return (-1.0, cell)
        return (min((math.dist(place(cell, grid), e) ** 2 for e in empty), default=0.0), cell)

    stays = sorted(sorted(cells, key=wanted)[:keep])
    groups = {c: [c] for c in stays}
    for cell in cells:
        if cell not in stays:
            # distances from a quarter of a cell back and up, so that the later of two as near takes it
            far = {a: math.dist([x - 0.25 for x in place(a, grid)], place(cell, grid)) ** 2 for a in stays}
            groups[min(stays, key=lambda a: (far[a], a))].append(cell)
    return groups


@prop(60)
@given(prefix_views(), st.integers(1, 30), seeds)
def test_by_place_alone(view: TokenView, tokens: int, seed: int) -> None:
    reducer = Pool(keep=Count(tokens))
    for seen in (view, as_masks(view), ragged(view, seed)):
        plan = reducer.plan(seen)
        plan.check(seen)
        for row in range(len(seen.hidden)):
            there = seen.valid[row].nonzero().flatten().tolist()
            fixed = [i for i in there if seen.protected[row, i]]
            token = {int(seen.position[row, i]) - len(fixed): i for i in there if i not in fixed}
            keep = max(1, tokens - len(fixed))
            groups = slow_pool(list(token), view.grid, keep) if keep < len(token) else {c: [c] for c in token}
            used = plan.valid[row].nonzero().flatten().tolist()
            assert plan.position[row, used].tolist() == [*range(len(fixed)), *(c + len(fixed) for c in groups)]
            for slot, members in zip(used[len(fixed) :], groups.values(), strict=True):
                own = sorted(token[c] for c in members)
                assert (plan.slot[row] == slot).nonzero().flatten().tolist() == own
                total = int(seen.size[row, own].sum())
                assert int(plan.size[row, slot]) == total
                want = (seen.size[row, own] / total).tolist()
                assert plan.weight[row, own].tolist() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 4, 4), (1, 2, 2)), ((1, 6, 6), (1, 2, 2)), ((1, 9, 9), (1, 3, 3)), ((1, 8, 8), (1, 4, 4)),
                        ((4, 4, 4), (2, 2, 2)), ((1, 1, 12), (1, 1, 4))],
)  # fmt: skip
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_where_the_grid_divides_it_is_average_pooling(
    grid: tuple[int, int, int], block: tuple[int, int, int], prefix: int
) -> None:
    count, cells = math.prod(grid) // math.prod(block), math.prod(grid)
    x = torch.randn(2, cells + prefix, 3, generator=torch.Generator().manual_seed(0))
    view = TokenView(x, prefix=prefix, grid=grid)
    pool = Pool(keep=Count(prefix + count))
    got = pool.combine(view, pool.plan(view), x)
    volume = x[:, prefix:].transpose(1, 2).reshape(2, 3, *grid)
    want = torch.nn.functional.avg_pool3d(volume, block).flatten(2).transpose(1, 2)
    torch.testing.assert_close(got, torch.cat([x[:, :prefix], want], 1), rtol=1e-5, atol=1e-6)


@prop(30)
@given(prefix_views(merged=False), st.integers(1, 30))
def test_a_fresh_image_keeps_a_lattice(view: TokenView, tokens: int) -> None:
    plan = Pool(keep=Count(tokens)).plan(view)
    keep = max(1, tokens - view.prefix)
    if keep < view.hidden.shape[1] - view.prefix:
        assert (plan.position[:, view.prefix :] - view.prefix).tolist() == [lattice(keep, view.grid)] * len(plan.slot)


def test_block_by_block_it_goes_on_from_what_is_left() -> None:
    view = make(2, 50, 1, 0)
    view = TokenView(view.hidden, prefix=1, grid=(1, 7, 7))
    x = view.hidden
    for left in (40, 30, 20, 10, 2):
        pool = Pool(keep=Count(left))
        plan = pool.plan(view)
        plan.check(view)
        assert plan.slots == left and plan.size.sum(-1).tolist() == [50, 50]
        x = pool.combine(view, plan, view.hidden)
        view = TokenView(x, prefix=1, grid=(1, 7, 7), position=plan.position, size=plan.size)
    # averages by size of averages are the average of all
    want = make(2, 50, 1, 0).hidden
    torch.testing.assert_close(x, torch.stack([want[:, 0], want[:, 1:].mean(1)], 1), rtol=1e-4, atol=1e-5)


def test_a_grid_that_does_not_hold_the_patches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grid must be \(T, H, W\), .* got none"):
        Pool(keep=Count(2)).plan(TokenView(torch.zeros(1, 5, 1), prefix=1))
    view = TokenView(torch.zeros(1, 5, 1), protected=torch.arange(5)[None] < 1, grid=(1, 1, 3))
    with pytest.raises(ValueError, match=r"position must lie in 1\.\.3, inside the grid \(1, 1, 3\) .* got 4"):
        Pool(keep=Count(2)).plan(view)


def test_settings() -> None:
    assert Pool.places == ("vision",) and Pool.proportional and Pool().needs.layers == 0
