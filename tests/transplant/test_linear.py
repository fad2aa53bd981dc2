"""Linear maps between spaces: exact where there is one, and least squares by its normal equations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor
from torch.nn.functional import cosine_similarity

from quickmerge.transplant.rules import LeastSquares, Procrustes


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@prop(20)
@given(seed=seeds, donor=st.integers(1, 8), base=st.integers(1, 8))
def test_least_squares_finds_any_linear_map(seed: int, donor: int, base: int) -> None:
    w, shift = drawn(seed, donor, base), drawn(seed + 1, base)
    anchors, targets = drawn(seed + 2, 30, donor) + 4, drawn(seed + 3, 5, donor)
    got = LeastSquares(0.0).rebuild(targets, anchors, anchors @ w + shift)
    torch.testing.assert_close(got, targets @ w + shift, rtol=1e-6, atol=1e-6)


@prop(15)
@given(seed=seeds, ridge=st.sampled_from((0.01, 0.1, 3.0)))
def test_ridge_by_its_gradient(seed: int, ridge: float) -> None:
    anchors, rows = drawn(seed, 40, 6) + 2, drawn(seed + 1, 40, 5) - 3
    middle = anchors.mean(0)
    # What the rule makes of the axes is the map itself.
    w = LeastSquares(ridge).rebuild(middle + torch.eye(6, dtype=torch.float64), anchors, rows) - rows.mean(0)
    x, y = anchors - middle, rows - rows.mean(0)
    strength = ridge * x.square().sum() / 6
    torch.testing.assert_close(x.T @ (x @ w - y) + strength * w, torch.zeros_like(w), rtol=0, atol=1e-9)


def test_fewer_tokens_than_dimensions() -> None:
    anchors, rows = drawn(0, 6, 20), drawn(1, 6, 8)
    for dtype in (torch.float32, torch.float64):
        got = LeastSquares(0.0).rebuild(anchors.to(dtype), anchors.to(dtype), rows.to(dtype))
        torch.testing.assert_close(got, rows.to(dtype), rtol=1e-4, atol=1e-5)
    alike = anchors[:1].expand(6, -1)
    for rule in (LeastSquares(), LeastSquares(0.0), Procrustes()):
        torch.testing.assert_close(rule.rebuild(anchors, alike, rows), rows.mean(0).expand(6, -1))


@prop(20)
@given(seed=seeds, narrow=st.integers(2, 8), extra=st.integers(0, 5), scale=st.sampled_from((0.1, 1.0, 7.0)))
def test_procrustes_finds_any_rotation(seed: int, narrow: int, extra: int, scale: float) -> None:
    turn = torch.linalg.qr(drawn(seed, narrow + extra, narrow)).Q.T
    anchors = (drawn(seed + 1, 60, narrow) + 2) * torch.linspace(1, 2, narrow, dtype=torch.float64)
    targets = drawn(seed + 2, 5, narrow)
    got = Procrustes().rebuild(targets, anchors, scale * anchors @ turn + 3)
    torch.testing.assert_close(got, scale * targets @ turn + 3, rtol=1e-6, atol=1e-6)
    # And the way back, from the wide space to the narrow one.
    back = Procrustes().rebuild(scale * targets @ turn + 3, scale * anchors @ turn + 3, anchors)
    torch.testing.assert_close(back, targets, rtol=1e-6, atol=1e-6)


def test_no_other_rotation_is_nearer() -> None:
    # On a map that is no rotation: least squares finds it, Procrustes comes near, the transpose would not.
    w = torch.eye(10, dtype=torch.float64) + 0.2 * drawn(0, 10, 10)
    turn = torch.linalg.qr(drawn(5, 10, 10)).Q
    anchors, targets = drawn(1, 200, 10), drawn(2, 50, 10)
    rows = anchors @ w @ turn
    near = cosine_similarity(Procrustes().rebuild(targets, anchors, rows), targets @ w @ turn, dim=1).mean()
    assert 0.8 < float(near) < 0.999
    x, y = anchors - anchors.mean(0), rows - rows.mean(0)

    def left(rotation: Tensor) -> float:
        z = x @ rotation
        return float(y.square().sum() - (z * y).sum().clamp_min(0) ** 2 / z.square().sum())

    own = Procrustes().rebuild(anchors.mean(0) + torch.eye(10, dtype=torch.float64), anchors, rows) - rows.mean(0)
    own = own / own.norm(dim=1, keepdim=True)
    torch.testing.assert_close(own @ own.T, torch.eye(10, dtype=torch.float64))
    for seed in range(20):
        nudge = torch.linalg.matrix_exp(0.1 * (drawn(seed, 10, 10) - drawn(seed, 10, 10).T))
        assert left(own) <= left(own @ nudge) + 1e-9


def test_ridge_out_of_range() -> None:
    with pytest.raises(ValueError, match="ridge"):
        LeastSquares(-0.1)
