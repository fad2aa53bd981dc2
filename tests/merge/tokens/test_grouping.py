"""Anchor rules and matching against literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import LENGTHS, PREFIXES, slow_pairs
from strategies import FLOATS, generator, numbers, prop, seeds, views
from torch import Tensor

from quickmerge.merge.tokens import MergePlan, TokenView
from quickmerge.merge.tokens.budget import Count, select
from quickmerge.merge.tokens.plan import bipartite_matching, bipartite_pairs, next_anchor


def anchors(view: TokenView, tokens: int, seed: int) -> Tensor:
    score = torch.rand(view.valid.shape, generator=generator(seed))
    return select(score, Count(tokens).count(view, None), view)


def cosine(a: Tensor, b: Tensor) -> float:
    """0 where either vector is zero."""
    dot = math.fsum(x * y for x, y in zip(a.double().tolist(), b.double().tolist(), strict=True))
    norms = float(a.double().norm() * b.double().norm())
    return dot / norms if norms > 0 else 0.0


def exact_units(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Vectors in four dimensions whose cosines are whole quarters, without rounding; some are zero."""
    signs = torch.randint(0, 2, (*shape, 4), generator=rng) * 2.0 - 1
    axes = torch.nn.functional.one_hot(torch.randint(0, 4, shape, generator=rng), 4) * 2.0
    kind = torch.randint(0, 5, (*shape, 1), generator=rng)
    return torch.where(kind == 0, 0.0, torch.where(kind < 3, axes, signs))


@prop(60)
@given(views(), st.integers(1, 40), seeds)
def test_next_anchor(view: TokenView, tokens: int, seed: int) -> None:
    anchor = anchors(view, tokens, seed)
    got = next_anchor(view, anchor)
    for row in range(anchor.shape[0]):
        for i in range(anchor.shape[1]):
            ahead = [j for j in range(i, anchor.shape[1]) if anchor[row, j] and not view.protected[row, j]]
            assert int(got[row, i]) == (ahead[0] if ahead and view.valid[row, i] else -1)


@prop(40)
@given(views(), st.integers(1, 40), seeds)
def test_no_slot_holds_anything_later_than_its_position(view: TokenView, tokens: int, seed: int) -> None:
    anchor = anchors(view, tokens, seed)
    plan = MergePlan.from_anchors(view, anchor, next_anchor(view, anchor))
    plan.check(view)
    member = plan.slot >= 0
    assert (view.position[member] <= plan.position.gather(1, plan.slot.clamp_min(0))[member]).all()


def slow_matching(metric: Tensor, open_: Tensor, remove: int) -> list[int]:
    """One row of ToMe's matching, said slowly."""
    tokens = open_.nonzero().flatten().tolist()
    first, second = tokens[::2], tokens[1::2]
    leader = [-1] * len(open_)
    if not second:
        return leader
    partner: dict[int, tuple[float, int]] = {}
    for i in first:
        alike = [cosine(metric[i], metric[j]) for j in second]
        partner[i] = (max(alike), second[alike.index(max(alike))])
    # the sort is stable: of equally close pairs the earlier goes first
    for i in sorted(first, key=lambda i: -partner[i][0])[:remove]:
        leader[i] = partner[i][1]
    return leader


@prop(100)
@given(st.integers(1, 3), st.integers(1, 25), st.booleans(), st.sampled_from((0.0, 0.3, 0.8, 1.0)), seeds)
def test_bipartite_matching(b: int, n: int, ties: bool, density: float, seed: int) -> None:
    rng = generator(seed)
    metric = exact_units((b, n), rng) if ties else numbers((b, n, 5), "normal", rng, torch.float64)
    open_ = torch.rand(b, n, generator=rng) < density
    remove = torch.randint(0, n + 4, (b,), generator=rng)
    got = bipartite_matching(metric, open_, remove)
    assert got.shape == (b, n) and got.dtype == torch.long
    for row in range(b):
        assert got[row].tolist() == slow_matching(metric[row], open_[row], int(remove[row]))


@prop(40)
@given(st.integers(1, 30), st.sampled_from(("normal", "tied", "twins", "zeros")), st.sampled_from(FLOATS), seeds)
def test_matching_removes_exactly_as_many_as_it_can(n: int, kind: str, dtype: torch.dtype, seed: int) -> None:
    rng = generator(seed)
    metric = numbers((2, n, 3), kind, rng, dtype)
    open_ = torch.rand(2, n, generator=rng) < 0.7
    remove = torch.randint(0, n + 4, (2,), generator=rng)
    got = bipartite_matching(metric, open_, remove)
    for row in range(2):
        tokens = open_[row].nonzero().flatten().tolist()
        gone = (got[row] >= 0).nonzero().flatten().tolist()
        most = (len(tokens) + 1) // 2 if len(tokens) > 1 else 0
        assert len(gone) == min(int(remove[row]), most)
        assert set(gone) <= set(tokens[::2]) and set(got[row][gone].tolist()) <= set(tokens[1::2])


@prop(50)
@given(st.integers(2, 40), st.integers(1, 4), st.sampled_from((1, 4, 16, 64)), seeds)
def test_equal_pairs_go_to_the_earlier_token(n: int, copies: int, width: int, seed: int) -> None:
    """All tokens alike: every pair ties, so the first ones merge, all into the first of the second set.

    Signs over a power of four: every product and sum is exact, so no order of summation can break the tie.
    """
    rng = generator(seed)
    metric = torch.randn(1, 1, width, generator=rng).sign().expand(copies, n, width)
    remove = torch.randint(1, n, (copies,), generator=rng)
    got = bipartite_matching(metric, torch.ones(copies, n, dtype=torch.bool), remove)
    for row in range(copies):
        want = [1 if i % 2 == 0 and i // 2 < int(remove[row]) else -1 for i in range(n)]
        assert got[row].tolist() == want


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("tokens", LENGTHS)
def test_pairs_of_known_number(tokens: int, prefix: int) -> None:
    """Against a loop, with and without weights: exact vectors with many ties and zeros, and random ones."""
    if tokens < prefix:
        return
    most, rng = (tokens - prefix) // 2, generator(tokens + prefix)
    for metric in (exact_units((2, tokens), rng), torch.randn(2, tokens, 5, generator=rng, dtype=torch.float64)):
        weight = torch.randint(0, 3, (2, tokens), generator=rng).to(metric.dtype)
        for remove, each in ((0, None), (min(13, most), None), (min(13, most), weight), (most, weight)):
            source, into, alike = bipartite_pairs(metric, prefix, remove, each)
            assert source.shape == into.shape == alike.shape == (2, remove)
            for row in range(2):
                weights = None if each is None else each[row].tolist()
                want = slow_pairs(metric[row].tolist(), prefix, remove, weights)
                got = list(zip(source[row].tolist(), into[row].tolist(), strict=True))
                assert got == want
                cosines = [cosine(metric[row, i], metric[row, j]) for i, j in want]
                assert alike[row].tolist() == pytest.approx(cosines, abs=1e-6)


@pytest.mark.parametrize(("tokens", "prefix", "remove"), [(9, 1, 5), (9, 0, 5), (2, 2, 1), (9, 1, -1)])
def test_pairs_that_there_are_not(tokens: int, prefix: int, remove: int) -> None:
    with pytest.raises(ValueError, match=rf"remove must lie in 0\.\.{(tokens - prefix) // 2}, got {remove}"):
        bipartite_pairs(torch.ones(1, tokens, 2), prefix, remove)


@prop(40)
@given(st.integers(1, 30), seeds, st.floats(0.2, 1))
def test_matching_by_weight(n: int, seed: int, density: float) -> None:
    """The least weight times distance goes first; weights of one are no weights."""
    rng = generator(seed)
    metric = torch.randn(2, n, 5, generator=rng, dtype=torch.float64)
    open_ = torch.rand(2, n, generator=rng) < density
    weight = torch.rand(2, n, generator=rng, dtype=torch.float64)
    remove = torch.randint(0, n + 2, (2,), generator=rng)
    got = bipartite_matching(metric, open_, remove, weight)
    assert torch.equal(bipartite_matching(metric, open_, remove, torch.ones_like(weight)),
                       bipartite_matching(metric, open_, remove))  # fmt: skip
    for row in range(2):
        tokens = open_[row].nonzero().flatten().tolist()
        first, second = tokens[::2], tokens[1::2]
        pairs = []
        for i in first if second else []:
            alike = {j: cosine(metric[row, i], metric[row, j]) for j in second}
            j = max(alike, key=lambda j: alike[j])
            pairs.append((float(weight[row, i]) * (1 - alike[j]), i, j))
        want = {i: j for _, i, j in sorted(pairs)[: int(remove[row])]}
        assert {i: j for i, j in enumerate(got[row].tolist()) if j >= 0} == want
