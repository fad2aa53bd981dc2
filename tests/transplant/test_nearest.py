"""Nearest shared tokens against loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.transplant import rules as module
from quickmerge.transplant.rules import Nearest


def slow(t: Tensor, anchors: Tensor, rule: Nearest) -> dict[int, float]:
    apart = []
    for i, a in enumerate(anchors):
        cosine = float(t @ a / t.norm() / a.norm())
        apart.append((1 - cosine if rule.metric == "cosine" else math.dist(t.tolist(), a.tolist()), i))
    near = sorted(apart)[: rule.k]
    if rule.weights == "softmax":
        raw = {i: math.exp(rule.temperature * (1 - away)) for away, i in near}
    else:
        raw = {i: 1 / away for away, i in near}
    return {i: w / sum(raw.values()) for i, w in raw.items()}


KINDS = st.sampled_from([("softmax", "cosine"), ("inverse_distance", "cosine"), ("inverse_distance", "euclidean")])


@prop(30)
@given(seed=seeds, n=st.integers(1, 30), k=st.integers(1, 8), kind=KINDS, temperature=st.sampled_from((1.0, 20.0)),
       memory=st.sampled_from((1, 10**6)))  # fmt: skip
def test_neighbours_and_weights(
    seed: int, n: int, k: int, kind: tuple[str, str], temperature: float, memory: int
) -> None:
    rng = generator(seed)
    targets, anchors = (torch.randn(m, 5, generator=rng, dtype=torch.float64) for m in (4, n))
    rule = Nearest(k, kind[0], temperature, kind[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MEMORY", memory)
        sparse = rule.coefficients(targets, anchors)
    torch.testing.assert_close(sparse.total, torch.ones(4, dtype=torch.float64))
    for row, t in enumerate(targets):
        want = slow(t, anchors, rule)
        got = dict(zip(sparse.indices[row].tolist(), sparse.weights[row].tolist(), strict=True))
        assert got == pytest.approx(want, rel=1e-6)
        assert list(got) == sorted(want, key=lambda i: -want[i])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_that_is_there_gets_all(metric: str, dtype: torch.dtype) -> None:
    # Far from zero, where lengths and products have no digits left for the distance.
    anchors = 100 + torch.randn(50, 6, generator=generator(0)).to(dtype)
    rows = torch.randn(50, 4, generator=generator(1)).to(dtype)
    rule = Nearest(8, "inverse_distance", metric=metric)
    torch.testing.assert_close(rule.rebuild(anchors[[7, 30]], anchors, rows), rows[[7, 30]], rtol=1e-3, atol=1e-3)


def test_two_equal_neighbours_share() -> None:
    anchors = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    rows = torch.tensor([[2.0], [4.0], [100.0]])
    got = Nearest(3, "inverse_distance", metric="euclidean").rebuild(torch.tensor([[1.0, 0.0]]), anchors, rows)
    assert got.tolist() == [[3.0]]


def test_temperature_goes_from_the_mean_to_the_nearest() -> None:
    rng = generator(0)
    targets, anchors, rows = (torch.randn(m, 5, generator=rng) for m in (3, 20, 20))
    cold = Nearest(20, temperature=1e4).rebuild(targets, anchors, rows)
    torch.testing.assert_close(cold, Nearest(1).rebuild(targets, anchors, rows))
    warm = Nearest(20, temperature=1e-6).rebuild(targets, anchors, rows)
    torch.testing.assert_close(warm, rows.mean(0).expand(3, -1), rtol=1e-4, atol=1e-4)


def test_what_it_refuses() -> None:
    with pytest.raises(QuickmergeError, match="did you mean 'softmax'"):
        Nearest(3, "softmx")
    with pytest.raises(QuickmergeError, match="metric must be one of cosine, euclidean"):
        Nearest(3, metric="dot")
    with pytest.raises(QuickmergeError, match="metric must be"):
        Nearest(3, "softmax", metric="euclidean")
    with pytest.raises(ValueError, match="temperature"):
        Nearest(3, temperature=0.0)
    with pytest.raises(ValueError, match="k must"):
        Nearest(0)
