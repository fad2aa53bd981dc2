"""Anchor rules, matching and clustering against literal loops."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import LENGTHS, PREFIXES, slow_pairs
from strategies import FLOATS, generator, numbers, prop, seeds, valid_masks, views
from torch import Tensor

from quickmerge.tokens import MergePlan, TokenView
from quickmerge.tokens.budget import Count, select
from quickmerge.tokens.grouping import (
    bipartite_matching,
    bipartite_pairs,
    chunked_clusters,
    next_anchor,
    similar_anchor,
)


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
@given(views(), st.integers(1, 40), seeds, st.integers(1, 45))
def test_no_slot_holds_anything_later_than_its_position(view: TokenView, tokens: int, seed: int, window: int) -> None:
    anchor = anchors(view, tokens, seed)
    for leader in (next_anchor(view, anchor), similar_anchor(view, anchor, window)):
        plan = MergePlan.from_anchors(view, anchor, leader)
        plan.check(view)
        member = plan.slot >= 0
        assert (view.position[member] <= plan.position.gather(1, plan.slot.clamp_min(0))[member]).all()


@pytest.mark.parametrize("causal", [True, False])
@prop(60)
@given(data=st.data(), tokens=st.integers(1, 20), window=st.integers(1, 25))
def test_similar_anchor(causal: bool, data: st.DataObject, tokens: int, window: int) -> None:
    view = data.draw(views(max_tokens=12, max_batch=2))
    seed = data.draw(seeds)
    if data.draw(st.booleans()):  # ties that are ties to the bit
        hidden = exact_units(view.valid.shape, generator(seed))
        view = TokenView(hidden, valid=view.valid, protected=view.protected)
    anchor = anchors(view, tokens, seed)
    got = similar_anchor(view, anchor, window, causal)
    b, n = anchor.shape
    for row in range(b):
        takes = {j for j in range(n) if anchor[row, j] and not view.protected[row, j]}
        for i in range(n):
            # nearest first, then to the right, so that the first of the best is the one to take
            order = [i + s * d for d in range(1, min(window, n - 1) + 1) for s in ((1,) if causal else (1, -1))]
            reach = [j for j in order if j in takes] if view.valid[row, i] else []
            leader = int(got[row, i])
            if not reach:
                assert leader == -1
                continue
            alike = {j: cosine(view.hidden[row, i], view.hidden[row, j]) for j in reach}
            best = max(alike.values())
            assert leader in reach
            assert alike[leader] >= best - 1e-6
            if view.hidden.shape[-1] == 4 and (view.hidden == (view.hidden * 2).round() / 2).all():
                assert leader == next(j for j in reach if alike[j] >= best - 1e-9)


@pytest.mark.parametrize("window", [0, -1])
def test_similar_anchor_refuses_an_empty_window(window: int) -> None:
    view = TokenView(torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match=f"window must be at least 1, got {window}"):
        similar_anchor(view, view.valid, window)


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


def slow_clusters(x: Tensor, valid: Tensor, chunk: int, clusters: int, steps: int) -> list[int]:
    """k-means by cosine in one row, chunk by chunk."""
    n = len(x)
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    labels = [-1] * n
    for piece, start in enumerate(range(0, n, chunk)):
        seats = [start + c * chunk // clusters for c in range(clusters)]
        centre = {c: x[s].clone() for c, s in enumerate(seats) if s < n and valid[s]}
        members = [i for i in range(start, min(start + chunk, n)) if valid[i]]
        for _ in range(steps):
            label = {}
            for i in members:
                score = {c: float(x[i] @ centre[c]) for c in centre}
                label[i] = max(score, key=lambda c: (score[c], -c)) if score else 0
            for c in centre:
                group = [x[i] for i in members if label[i] == c]
                if group:
                    centre[c] = torch.nn.functional.normalize(torch.stack(group).sum(0), dim=-1)
        for i in members:
            labels[i] = piece * clusters + label[i]
    return labels


@prop(60)
@given(st.data(), st.integers(1, 20), st.integers(1, 9), st.integers(1, 4))
def test_chunked_clusters(data: st.DataObject, n: int, chunk: int, steps: int) -> None:
    clusters = data.draw(st.integers(1, chunk))
    valid = data.draw(valid_masks(2, n, data.draw(st.sampled_from(("none", "right", "left", "mixed")))))
    x = numbers((2, n, 5), "normal", generator(data.draw(seeds)), torch.float64)
    got = chunked_clusters(x, valid, chunk, clusters, steps)
    for row in range(2):
        assert got[row].tolist() == slow_clusters(x[row], valid[row], chunk, clusters, steps)


@prop(60)
@given(
    st.data(),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(("normal", "tied", "twins", "zeros")),
    st.sampled_from(FLOATS),
)
def test_cluster_labels_stay_inside_their_chunk(
    data: st.DataObject, n: int, chunk: int, kind: str, dtype: torch.dtype
) -> None:
    clusters = data.draw(st.integers(1, chunk))
    valid = data.draw(valid_masks(3, n))
    x = numbers((3, n, 3), kind, generator(data.draw(seeds)), dtype)
    x = torch.where(valid[..., None], x, 1e30)
    got = chunked_clusters(x, valid, chunk, clusters)
    assert torch.equal(got, chunked_clusters(x.clone(), valid, chunk, clusters))
    low = (torch.arange(n) // chunk * clusters).expand_as(got)
    assert ((got >= low) & (got < low + clusters))[valid].all()
    assert (got[~valid] == -1).all()


@prop(30)
@given(st.data(), st.integers(1, 30), st.integers(1, 9), st.integers(0, 20))
def test_padding_on_the_right_changes_no_cluster(data: st.DataObject, n: int, chunk: int, extra: int) -> None:
    clusters = data.draw(st.integers(1, chunk))
    x = numbers((1, n, 5), "normal", generator(data.draw(seeds)), torch.float64)
    there = torch.ones(1, n, dtype=torch.bool)
    wide = torch.cat([x, x.new_full((1, extra, 5), 1e30)], 1)
    got = chunked_clusters(wide, torch.cat([there, there.new_zeros(1, extra)], 1), chunk, clusters)
    assert torch.equal(got[:, :n], chunked_clusters(x, there, chunk, clusters))


def test_clusters_find_what_is_plainly_apart() -> None:
    rng = generator(0)
    kinds = torch.tensor([0, 0, 1, 2, 1, 2, 0, 1, 2, 1, 0, 2])
    x = torch.eye(3)[kinds] + 0.05 * torch.randn(12, 3, generator=rng)
    got = chunked_clusters(x[None].repeat(1, 2, 1), torch.ones(1, 24, dtype=torch.bool), 12, 3)[0]
    for half in (got[:12], got[12:] - 3):
        together = half[:, None] == half[None]
        assert torch.equal(together, kinds[:, None] == kinds[None])


def test_a_cluster_that_loses_its_members_stays_where_it_was() -> None:
    """Both centres start at the same token; the second is empty at first and then takes the tokens it equals."""
    x = torch.eye(3)[[0, 1, 0, 2]][None]
    valid = torch.ones(1, 4, dtype=torch.bool)
    assert chunked_clusters(x, valid, 4, 2, steps=1).tolist() == [[0, 0, 0, 0]]
    assert chunked_clusters(x, valid, 4, 2, steps=2).tolist() == [[1, 0, 1, 0]]


@pytest.mark.parametrize(("chunk", "clusters"), [(0, 1), (4, 0), (4, 5), (-1, -1)])
def test_clusters_refuse_bad_sizes(chunk: int, clusters: int) -> None:
    message = f"clusters must lie in 1..chunk, got clusters={clusters} and chunk={chunk}"
    with pytest.raises(ValueError, match=message):
        chunked_clusters(torch.zeros(1, 4, 2), torch.ones(1, 4, dtype=torch.bool), chunk, clusters)


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
