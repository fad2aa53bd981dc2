"""Ranking, budget and rows to fetch, against literal loops."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from attend_samples import random_case
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.multipole.selection import (
    FEW,
    Choice,
    choose,
    gather_index,
    layout,
    lookup,
    mix,
    per_key,
    products,
    rows_at,
    scores,
    weigh,
)


def candidates(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Shares, some of them equal or 0, and members and counts, some of them 0."""
    rng, draws = Random(seed), generator(seed)
    b, h, q, c = (rng.randint(1, n) for n in (2, 3, 3, 12))
    members = torch.randint(0, 7, (b, h, c), generator=draws, dtype=torch.int32)
    count = (members * torch.randint(0, 3, members.shape, generator=draws)).float()
    share = torch.rand(b, h, q, c, generator=draws, dtype=torch.float64)
    if rng.random() < 0.5:
        share = (share * 3).round() / 3
    share = share * (count > 0)[:, :, None]
    mass = (share * count[:, :, None]).sum(-1, keepdim=True)
    return share / torch.where(mass > 0, mass, 1.0), members, count


def slow_choice(
    share: list[float], members: list[int], count: list[float], budget: int, top_p: float | None
) -> list[int]:
    """The paper's rule, one cluster after the other."""
    order = sorted(range(len(share)), key=lambda i: (-float(torch.tensor(share[i]).float()), i))
    chosen: list[int] = []
    rows, mass = 0, 0.0
    for i in order:
        if not members[i] or not count[i]:
            continue
        if rows + members[i] > budget or (top_p is not None and mass >= top_p):
            break
        chosen.append(i)
        rows, mass = rows + members[i], mass + share[i] * count[i]
    return chosen


def chosen(choice: Choice, at: tuple[int, int, int]) -> list[int]:
    return choice.order[at][choice.taken[at]].tolist()


@prop(80)
@given(seeds, st.integers(0, 45), st.none() | st.floats(0.05, 0.99))
def test_choice_is_the_longest_prefix_that_fits(seed: int, budget: int, top_p: float | None) -> None:
    share, members, count = candidates(seed)
    if top_p is None:
        choice = choose(share, members, count, budget)
    else:
        choice = choose(share, members, count, budget, "top_p", top_p)
    mask = choice.mask(share.shape[-1])
    for b, h, q in torch.cartesian_prod(*(torch.arange(n) for n in share.shape[:3])).tolist():
        own = members[b, h].tolist()
        want = slow_choice(share[b, h, q].tolist(), own, count[b, h].tolist(), budget, top_p)
        assert chosen(choice, (b, h, q)) == want
        assert mask[b, h, q].nonzero().flatten().tolist() == sorted(want)
        assert choice.rows[b, h, q].sum() == sum(own[i] for i in want)
        assert choice.rows[b, h, q][~choice.taken[b, h, q]].sum() == 0


@prop(50)
@given(seeds)
def test_candidates_of_each_query_are_chosen_alike(seed: int) -> None:
    share, members, count = candidates(seed)
    shape = share.shape
    same = choose(share, members[:, :, None].expand(shape), count[:, :, None].expand(shape), 9)
    for a, b in zip(same, choose(share, members, count, 9), strict=True):
        assert torch.equal(a, b)


def test_equal_shares_go_to_the_earlier_cluster() -> None:
    for clusters in (4, 200, 5000):
        share = torch.full((1, 1, 1, clusters), 0.25)
        choice = choose(share, torch.full((1, 1, clusters), 2), torch.full((1, 1, clusters), 2.0), 6)
        assert chosen(choice, (0, 0, 0)) == [0, 1, 2]


def test_a_cluster_that_does_not_fit_ends_the_choice() -> None:
    share = torch.tensor([[[[0.1, 0.4, 0.3, 0.2]]]])
    members = torch.tensor([[[1, 2, 50, 1]]])
    choice = choose(share, members, members.float(), 10)
    assert chosen(choice, (0, 0, 0)) == [1]
    first = choose(share, torch.tensor([[[1, 50, 2, 1]]]), members.float(), 10)
    assert chosen(first, (0, 0, 0)) == []
    assert int(first.rows.sum()) == 0


def test_budget_of_all_members_takes_clusters_whose_share_vanishes() -> None:
    share = torch.zeros(1, 1, 1, 6)
    share[..., 3] = 1e-30
    members = torch.tensor([[[0, 2, 0, 1, 0, 3]]])
    choice = choose(share, members, members.float(), 6)
    assert sorted(chosen(choice, (0, 0, 0))) == [1, 3, 5]


@prop(60)
@given(seeds, st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_a_larger_top_p_takes_more(seed: int, a: float, b: float) -> None:
    share, members, count = candidates(seed)
    low, high = sorted((a, b))
    few, more = (choose(share, members, count, 30, "top_p", p) for p in (low, high))
    assert (few.taken <= more.taken).all()
    assert (more.taken <= choose(share, members, count, 30).taken).all()
    assert torch.equal(choose(share, members, count, 30, "top_p", 1.0).taken, choose(share, members, count, 30).taken)


@prop(40)
@given(seeds, st.booleans())
def test_scores_are_the_softmax_of_the_paper(seed: int, variance: bool) -> None:
    case = random_case(seed, spread=True)
    z, share = scores(case.query, case.clusters, case.scaling, variance)
    b, hq, q, d = case.query.shape
    h, g = case.keys.shape[1], case.query.shape[1] // case.keys.shape[1]
    for r, i, j in torch.cartesian_prod(torch.arange(b), torch.arange(hq), torch.arange(q)).tolist():
        own, count = case.query[r, i, j], case.clusters.count[r, i // g]
        for c in range(len(case.clusters)):
            want = case.scale * float(own @ case.clusters.key[r, i // g, c])
            if variance and case.clusters.spread is not None:
                want += case.scale**2 * float(own @ own) * float(case.clusters.spread[r, i // g, c]) / (2 * d)
            assert float(z[r, i, j, c]) == (pytest.approx(want, abs=1e-9) if count[c] > 0 else -math.inf)
    for r, k, j in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(q)).tolist():
        count = case.clusters.count[r, k].double()
        rows = [[math.exp(v) for v in z[r, k * g + i, j].tolist()] for i in range(g)]
        total = [math.fsum(n * v for n, v in zip(count.tolist(), row, strict=True)) for row in rows]
        for c in range(len(count)):
            want = sum(row[c] / t if t else 0.0 for row, t in zip(rows, total, strict=True)) / g
            assert float(share[r, k, j, c]) == pytest.approx(want, rel=1e-9, abs=1e-15)
        assert float(share[r, k, j] @ count) == pytest.approx(1.0 if count.sum() else 0.0)


def test_scores_need_the_spread_that_they_are_to_use() -> None:
    with pytest.raises(ValueError, match="variance must be False"):
        scores(random_case(1).query, random_case(1).clusters, variance=True)


@prop(60)
@given(seeds, st.integers(0, 40))
def test_index_lists_the_members_of_the_chosen(seed: int, budget: int) -> None:
    clusters = random_case(seed).clusters
    b, h, c = clusters.count.shape
    share = torch.rand(b, h, 3, c, generator=generator(seed))
    choice = choose(share, clusters.members, clusters.count, budget)
    width = min(budget, clusters.width)
    if not width:
        return
    index, valid = gather_index(clusters.order, clusters.offset, choice, width)
    assert index.shape == valid.shape == (b, h, 3, width)
    assert (index >= 0).all() and (index < clusters.width).all()
    each = clusters.offset[:, :, None].expand(b, h, 3, c)
    assert torch.equal(gather_index(clusters.order, each, choice, width)[0], index)
    for r, k, j in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(3)).tolist():
        label = clusters.labels[r, k].tolist()
        want = [m for i in chosen(choice, (r, k, j)) for m in range(clusters.width) if label[m] == i]
        assert index[r, k, j][valid[r, k, j]].tolist() == want
        assert valid[r, k, j].sum() == len(want) == choice.rows[r, k, j].sum()


@pytest.mark.parametrize("kind", ["plain", "room", "transposed", "repeated", "reversed", "odd", "channels"])
def test_rows_of_any_strides(kind: str) -> None:
    x = torch.arange(2.0 * 3 * 11 * 4).view(2, 3, 11, 4)
    if kind == "room":
        x = torch.randn(2, 3, 16, 4)[:, :, 2:13]
    elif kind == "transposed":
        x = torch.randn(2, 11, 3, 4).transpose(1, 2)
    elif kind == "repeated":
        x = torch.randn(1, 3, 11, 4).expand(2, -1, -1, -1)
    elif kind == "reversed":
        x = torch.randn(11, 3, 2, 4).permute(2, 1, 0, 3)
    elif kind == "odd":
        x = torch.randn(2, 3, 11, 5)[..., :4]
    elif kind == "channels":
        x = torch.randn(2, 3, 4, 11).transpose(2, 3)
    for shape in ((2, 3, 7), (2, 3, 2, 5), (2, 3, 0)):
        index = torch.randint(11, shape)
        got = rows_at(x, index)
        assert got.shape == (*shape, 4)
        for b in range(2):
            for h in range(3):
                assert torch.equal(got[b, h].reshape(-1, 4), x[b, h][index[b, h].flatten()])


@pytest.mark.parametrize("queries", [1, FEW, 3 * FEW])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_products_and_sums_of_either_kind(queries: int, dtype: torch.dtype) -> None:
    precise = torch.promote_types(dtype, torch.float32)
    query, draws = torch.randn(2, 3, queries, 2, 5, dtype=precise), generator(0)
    shared = torch.randn(2, 3, 20, 5, generator=draws)[:, :, 4:13].to(dtype)
    own = torch.randn(2, 3, queries, 9, 5, generator=draws).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5}
    want = torch.einsum("bhqgd,bhwd->bhqgw", query.double(), shared.double())
    got = products(query, shared)
    assert got.dtype == precise
    torch.testing.assert_close(got.double(), want, **close)
    each = torch.einsum("bhqgd,bhqwd->bhqgw", query.double(), own.double())
    torch.testing.assert_close(products(query, own).double(), each, **close)
    weight = torch.rand(2, 3, queries, 2, 30, generator=draws).to(precise)[..., 3:12]
    want = torch.einsum("bhqgw,bhwd->bhqgd", weight.double(), shared.double())
    torch.testing.assert_close(mix(weight, shared).double(), want, **close)
    each = torch.einsum("bhqgw,bhqwd->bhqgd", weight.double(), own.double())
    torch.testing.assert_close(mix(weight, own).double(), each, **close)


def test_weights_of_nothing_are_zero() -> None:
    found = weigh(torch.tensor([[-torch.inf, -torch.inf], [0.0, -torch.inf]]))
    assert found.weight.tolist() == [[0.0, 0.0], [1.0, 0.0]]
    assert found.total.tolist() == [[0.0], [1.0]]
    query = layout(torch.randn(1, 2, 1, 4), 1)
    none = torch.zeros(1, 1, 3)
    looked = lookup(query, torch.randn(1, 1, 3, 4), none)
    assert not looked.weight.any() and not per_key(looked, none).any()
