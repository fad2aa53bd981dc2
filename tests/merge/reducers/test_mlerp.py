"""MLERP against a brute-force float64 statement, one slot at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import prefix_views
from strategies import FLOATS, generator, plans, prop, tolerance, views
from torch import Tensor

from quickmerge.merge.reducers.tofu import mlerp
from quickmerge.merge.tokens import MergePlan, TokenView


def slow_mlerp(plan: MergePlan, x: Tensor) -> dict[tuple[int, int], list[float]]:
    """Slot by slot: the weighted mean, over its norm, times the largest norm of a member."""
    out = {}
    for row in range(len(x)):
        for slot in range(plan.slots):
            members = [i for i, s in enumerate(plan.slot[row].tolist()) if s == slot]
            if not members:
                continue
            vectors = [x[row, i].double().tolist() for i in members]
            shares = [float(plan.weight[row, i]) for i in members]
            mean = [math.fsum(w * v for w, v in zip(shares, axis, strict=True)) for axis in zip(*vectors, strict=True)]
            longest, length = max(math.hypot(*v) for v in vectors), math.hypot(*mean)
            scale = longest / length if length > 1e-3 * longest else math.nan
            out[row, slot] = vectors[0] if len(members) == 1 else [v * scale for v in mean]
    return out


@prop(60)
@given(st.data())
def test_by_brute_force(data: st.DataObject) -> None:
    view = data.draw(views(garbage=False, kinds=("normal", "twins")))
    plan = data.draw(plans(view))
    got = mlerp(plan, view.hidden)
    assert got.dtype == view.hidden.dtype
    for (row, slot), want in slow_mlerp(plan, view.hidden).items():
        if not math.isnan(sum(want)):  # where members nearly cancel out, rounding decides on the direction
            slack = 2000 * tolerance(got.dtype) if got.dtype != torch.bfloat16 else 0.05
            assert got[row, slot].tolist() == pytest.approx(want, rel=slack, abs=slack)


@prop(40)
@given(prefix_views(kinds=("normal",), dtypes=(torch.float32, torch.float64), max_patches=20), st.integers(1, 9))
def test_every_slot_is_as_long_as_its_longest_member_and_points_as_the_mean_does(view: TokenView, gone: int) -> None:
    prefix, n = view.prefix, view.hidden.shape[1]
    gone = min(gone, n - prefix - 1)
    source = torch.arange(n - gone, n).expand(len(view.hidden), -1)
    plan = MergePlan.from_moves(view, source, torch.full_like(source, prefix))
    got, mean = mlerp(plan, view.hidden), plan.merge(view.hidden)
    norm = view.hidden.norm(dim=-1)
    longest = torch.stack([norm[:, prefix], *(norm[:, i] for i in range(n - gone, n))]).amax(0)
    torch.testing.assert_close(got[:, prefix].norm(dim=-1), longest, rtol=1e-5, atol=1e-5)
    if view.hidden.shape[-1] > 1:
        alike = torch.cosine_similarity(got[:, prefix].double(), mean[:, prefix].double(), dim=-1)
        assert (alike > 1 - 1e-6).all() or float(mean[:, prefix].norm(dim=-1).min()) < 1e-2
    rest = [k for k in range(plan.slots) if k != prefix]
    assert torch.equal(got[:, rest], view.hidden[:, rest])


@prop(40)
@given(st.data())
def test_a_slot_of_one_is_a_copy_to_the_bit(data: st.DataObject) -> None:
    view = data.draw(views(kinds=("normal", "zeros")))
    plan = data.draw(plans(view))
    merged = mlerp(plan, view.hidden)
    for row, slots in enumerate(plan.slot.tolist()):
        for token, slot in enumerate(slots):
            if slot >= 0 and slots.count(slot) == 1:
                assert torch.equal(merged[row, slot], view.hidden[row, token])
    assert (merged[~plan.valid] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tokens_that_cancel_out_stay_finite_and_no_longer_than_the_longest(dtype: torch.dtype) -> None:
    view = TokenView(torch.zeros(3, 2, 4, dtype=dtype), prefix=0)
    plan = MergePlan.from_moves(view, torch.ones(3, 1).long(), torch.zeros(3, 1).long())
    one = torch.randn(3, 4, generator=generator(0)).to(dtype)
    x = torch.stack([one, -one], 1)
    x[1] *= 1 + 1e-6
    x[2] = 0
    x.requires_grad_()
    got = mlerp(plan, x)
    assert got.isfinite().all()
    assert (got.double().norm(dim=-1) <= 1.01 * x.double().norm(dim=-1).amax(1, keepdim=True)).all()
    got.sum().backward()
    assert x.grad.isfinite().all()


def test_known_case() -> None:
    """Lengths 3 and 4 at a right angle: the mean has length 2.5, the result 4."""
    view = TokenView(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]), prefix=0)
    plan = MergePlan.from_moves(view, torch.tensor([[1]]), torch.tensor([[0]]))
    torch.testing.assert_close(mlerp(plan, view.hidden), torch.tensor([[[2.4, 3.2]]]))
