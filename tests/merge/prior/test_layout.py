"""Where slots stand on a grid, and looking at others from there."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.layout import layout_of, read_slots
from quickmerge.merge.prior.model import BACKWARD
from quickmerge.merge.prior.network import GRID_BASE, SlotTransformer, cells, rotate
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens import TokenView


def build(axes: int) -> Prior:
    torch.manual_seed(0)
    shape = {"features": 4, "width": 24, "layers": 1, "heads": 2, "pool": 0, "saliency": False}
    return Prior(PriorConfig(axes=axes, **shape)).double().eval()


def picture(seed: int, grid: tuple[int, int, int]) -> TokenView:
    n = grid[0] * grid[1] * grid[2]
    return TokenView(torch.randn(2, n, 4, generator=generator(seed), dtype=torch.float64), grid=grid)


@prop(20)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), seeds)
def test_cells_are_the_mean_place_of_the_members(t: int, h: int, w: int, seed: int) -> None:
    view = picture(seed, (t, h, w))
    plan = GridMerge(keep=0.4).plan(view)
    got = cells(view, plan)
    for row in range(2):
        for k in plan.valid[row].nonzero().flatten().tolist():
            members = (plan.slot[row] == k).nonzero().flatten().tolist()
            places = torch.tensor([[i // (h * w), i // w % h, i % w] for i in members], dtype=torch.float64)
            torch.testing.assert_close(got[row, k], places.mean(0))


@pytest.mark.parametrize("axes", [2, 3])
def test_a_layout_tells_places_and_sizes_and_no_contents(axes: int) -> None:
    prior = build(axes)
    view = picture(0, (2, 3, 4) if axes == 3 else (1, 4, 5))
    plan = GridMerge(keep=0.4).plan(view)
    layout = layout_of(prior, view, plan)
    assert layout.position.shape == (2, plan.slots, axes) and torch.equal(layout.size, plan.size)
    other = layout_of(prior, TokenView(view.hidden * 3 + 1, grid=view.grid), plan)
    assert torch.equal(other.place, layout.place) and torch.equal(other.aim, layout.aim)


@prop(20)
@given(seeds, st.integers(1, 3), st.floats(-50, 50))
def test_axial_scores_depend_on_distance_only(seed: int, axes: int, shift: float) -> None:
    draws = generator(seed)
    x = torch.randn(1, 2, 6, 24, generator=draws, dtype=torch.float64)
    place = 20 * torch.rand(1, 6, axes, generator=draws, dtype=torch.float64)
    moved = place + shift * torch.rand(axes, generator=draws, dtype=torch.float64)
    one = rotate(x, place) @ rotate(x, place).transpose(-1, -2)
    two = rotate(x, moved) @ rotate(x, moved).transpose(-1, -2)
    torch.testing.assert_close(one, two, atol=1e-3, rtol=1e-3)  # angles are float32
    torch.testing.assert_close(rotate(x, place).square().sum(), x.square().sum(), atol=1e-3, rtol=0)


def test_each_axis_turns_pairs_of_its_own() -> None:
    x = torch.randn(1, 1, 1, 12, generator=generator(1), dtype=torch.float64)
    turned = rotate(x, torch.tensor([[[0.0, 3.0]]]))
    pairs = [(i, i + 6) for i in range(6)]
    for pair in pairs[:3]:  # of the first axis, where nothing is moved
        assert torch.equal(turned[..., list(pair)], x[..., list(pair)])
    for i, (a, b) in enumerate(pairs[3:]):
        angle = torch.tensor(3.0 * GRID_BASE ** (-i / 3), dtype=torch.float64)
        want = x[..., a] * angle.cos() - x[..., b] * angle.sin()
        torch.testing.assert_close(turned[..., a], want, atol=1e-6, rtol=1e-6)


def test_looking_from_elsewhere_changes_scores_and_not_keys() -> None:
    torch.manual_seed(0)
    net = SlotTransformer(24, 1, 2).double().eval()
    x, every = torch.randn(1, 5, 24, dtype=torch.float64), torch.ones(1, 5, dtype=torch.bool)
    place = torch.arange(5.0)[None]
    plain = net(x, place, every)
    assert torch.equal(net(x, place, every, asking=place), plain)
    assert not torch.allclose(net(x, place, every, asking=place + 1), plain)
    # moved together, nothing changes
    torch.testing.assert_close(net(x, place + 7, every, asking=place + 7), plain, atol=1e-5, rtol=1e-5)


def test_backward_is_forward_through_the_slots_in_reverse() -> None:
    """A layout and contents turned round, and places negated, read alike but for the direction's own vector."""
    prior = build(2)
    with torch.no_grad():
        prior.direction.weight[1] = prior.direction.weight[0]
    view = picture(3, (1, 4, 5))
    plan = GridMerge(keep=0.5).plan(view)
    layout, slots = layout_of(prior, view, plan), plan.merge(view.hidden)
    turned = type(layout)(
        layout.place.flip(1), layout.aim.flip(1), -layout.position.flip(1), layout.size.flip(1), layout.valid.flip(1)
    )
    back = read_slots(prior, slots, layout, BACKWARD)
    torch.testing.assert_close(back, read_slots(prior, slots.flip(1), turned).flip(1))
