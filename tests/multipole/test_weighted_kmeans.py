"""k-means against the plainest float64 loops, from the same points."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import KINDS, generator, numbers, prop, seeds, up_to
from torch import Tensor

from quickmerge.multipole import weighted_kmeans as nearest_module
from quickmerge.multipole.weighted_kmeans import Draws, group, kmeans, means, nearest, nearest_again


def slow_label(x: list[list[float]], centroids: list[list[float]]) -> list[int]:
    def distance(a: list[float], b: list[float]) -> float:
        return math.fsum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    label = []
    for a in x:
        away = sorted((distance(a, c), i) for i, c in enumerate(centroids))
        # Who is nearest is a matter of rounding where two are equally near, as a cluster begun anew and its model are.
        assume(len(away) == 1 or away[1][0] - away[0][0] > 1e-6)
        label.append(away[0][1])
    return label


def slow_means(x: list[list[float]], label: list[int], clusters: int, weight: list[float]) -> list[list[float] | None]:
    out: list[list[float] | None] = []
    for i in range(clusters):
        own = [n for n, a in enumerate(label) if a == i]
        total = math.fsum(weight[n] for n in own)
        out.append(
            [math.fsum(weight[n] * x[n][d] for n in own) / total for d in range(len(x[0]))] if total > 0 else None
        )
    return out


def slow_kmeans(
    x: list[list[float]], start: list[int], iterations: int, weight: list[float], fresh: list[list[int]]
) -> tuple[list[int], list[list[float]]]:
    """Lloyd's rounds of one problem; ``fresh`` are the points that clusters without members start anew from."""
    centroids = [x[n] for n in start]
    for step in range(iterations):
        new = slow_means(x, slow_label(x, centroids), len(start), weight)
        for i, mean in enumerate(new):
            if mean is not None:
                centroids[i] = mean
            elif step < iterations - 1:
                centroids[i] = x[fresh[step][i]]
    label = slow_label(x, centroids)
    return label, [mean or [0.0] * len(x[0]) for mean in slow_means(x, label, len(start), weight)]


@prop(40)
@given(
    problems=up_to(3), length=up_to(40), clusters=up_to(9), width=up_to(5), iterations=st.integers(0, 6),
    weighted=st.booleans(), seed=seeds, dtype=st.sampled_from([torch.float64, torch.float32]),
)  # fmt: skip
def test_every_problem_equals_plain_loops(
    problems: int, length: int, clusters: int, width: int, iterations: int, weighted: bool, seed: int,
    dtype: torch.dtype,
) -> None:  # fmt: skip
    draws = generator(seed)
    clusters = min(clusters, length)
    x = torch.randn(problems, length, width, generator=draws, dtype=torch.float64) + 5
    init = torch.stack([torch.randperm(length, generator=draws)[:clusters] for _ in range(problems)])
    x = x.to(dtype)
    weight = torch.randint(0, 4, (problems, length), generator=draws).to(dtype) if weighted else None
    if weight is not None:
        x = torch.where(weight[..., None] > 0, x, math.inf)
    label, centroids = kmeans(x, clusters, iterations, weight, seed=7, init=init)
    again = Draws(length, 7, weight)
    fresh = [again.any(clusters, x) for _ in range(max(0, iterations - 1))]
    assert label.dtype == torch.long and centroids.dtype == dtype
    for r in range(problems):
        w = [1.0] * length if weight is None else weight[r].tolist()
        rows = torch.where(torch.tensor(w)[:, None] > 0, x[r].double(), 0.0).tolist()
        want, mean = slow_kmeans(rows, init[r].tolist(), iterations, w, [one[r].tolist() for one in fresh])
        live = [n for n in range(length) if w[n] > 0]
        assert [label[r, n].item() for n in live] == [want[n] for n in live]
        torch.testing.assert_close(centroids[r].double(), torch.tensor(mean, dtype=torch.float64), rtol=1e-5, atol=1e-5)


def test_a_cluster_without_members_begins_anew_but_for_the_last_round() -> None:
    """The last of three start points has no weight and so stands at 0, where nobody is near it."""
    x = torch.tensor([[[20.0], [21.0], [22.5], [23.0], [24.0], [30.0], [30.1], [math.nan]]], dtype=torch.float64)
    weight = torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.float64)
    init = torch.tensor([[0, 4, 7]])
    for iterations in (1, 2, 3, 6):
        fresh = Draws(8, 5, weight)
        label, _ = kmeans(x, 3, iterations, weight, seed=5, init=init)
        rows = torch.where(weight[..., None] > 0, x, 0.0)[0].tolist()
        centroids = [rows[n] for n in init[0].tolist()]
        for step in range(iterations):
            near = [min(range(3), key=lambda i: (abs(a[0] - centroids[i][0]), i)) for a in rows]
            for i, mean in enumerate(slow_means(rows, near, 3, weight[0].tolist())):
                centroids[i] = mean if mean is not None else centroids[i]
                if mean is None and step < iterations - 1:
                    centroids[i] = rows[int(fresh.any(3, x)[0, i])]
        want = [min(range(3), key=lambda i: (abs(a[0] - centroids[i][0]), i)) for a in rows]
        assert label[0].tolist()[:7] == want[:7]
        assert (2 in want[:7]) == (iterations > 1)


@prop(40)
@given(length=up_to(60), clusters=up_to(70), seed=seeds, kind=st.sampled_from(KINDS), weighted=st.booleans())
def test_labels_and_centroids_agree(length: int, clusters: int, seed: int, kind: str, weighted: bool) -> None:
    """Also with more clusters than points, or than different points: some are then empty, and none is in use twice."""
    draws = generator(seed)
    x = numbers((2, length, 3), kind, draws, torch.float64)
    weight = torch.rand(2, length, generator=draws, dtype=torch.float64).round(decimals=1) if weighted else None
    label, centroids = kmeans(x, clusters, 4, weight, seed)
    assert centroids.shape == (2, clusters, 3) and label.shape == (2, length)
    assert label.min() >= 0 and label.max() < min(clusters, length)
    for r in range(2):
        w = torch.ones(length, dtype=torch.float64) if weight is None else weight[r]
        for i in range(clusters):
            own = label[r] == i
            want = (w[own, None] * x[r, own]).sum(0) / w[own].sum() if w[own].sum() > 0 else torch.zeros(3)
            torch.testing.assert_close(centroids[r, i], want.double(), rtol=1e-9, atol=1e-9)


def test_no_points_at_all() -> None:
    label, centroids = kmeans(torch.zeros(2, 0, 3), 4)
    assert label.shape == (2, 0) and torch.equal(centroids, torch.zeros(2, 4, 3))


def test_as_many_clusters_as_points_is_each_its_own() -> None:
    x = torch.randn(3, 17, 5, generator=generator(0))
    label, centroids = kmeans(x, 17, 3)
    assert all(sorted(row.tolist()) == list(range(17)) for row in label)
    torch.testing.assert_close(centroids.gather(1, label[..., None].expand_as(x)), x)


@prop(20)
@given(length=up_to(80), clusters=up_to(8), seed=seeds, weighted=st.booleans())
def test_a_batch_equals_its_problems(length: int, clusters: int, seed: int, weighted: bool) -> None:
    draws = generator(seed)
    x = torch.randn(4, length, 6, generator=draws)
    weight = torch.randint(0, 3, (4, length), generator=draws).float() if weighted else None
    label, centroids = kmeans(x, clusters, 5, weight)
    for r in range(4):
        alone = kmeans(x[r : r + 1], clusters, 5, None if weight is None else weight[r : r + 1])
        assert torch.equal(label[r], alone[0][0]) and torch.equal(centroids[r], alone[1][0])


@prop(20)
@given(length=up_to(50), clusters=up_to(8), seed=seeds)
def test_the_order_of_the_points_does_not_matter(length: int, clusters: int, seed: int) -> None:
    draws = generator(seed)
    x = torch.randn(2, length, 4, generator=draws, dtype=torch.float64)
    shuffle = torch.randperm(length, generator=draws)
    start = torch.randperm(length, generator=draws)[: min(clusters, length)]
    place = torch.empty_like(shuffle)
    place[shuffle] = torch.arange(length)
    one = kmeans(x, clusters, 5, init=start.expand(2, -1))
    two = kmeans(x[:, shuffle], clusters, 5, init=place[start].expand(2, -1))
    assert torch.equal(one[0][:, shuffle], two[0])
    torch.testing.assert_close(one[1], two[1], rtol=1e-12, atol=1e-12)


def test_rounds_never_make_it_worse() -> None:
    """And whole points weighted twice are the same as points that are there twice."""
    x = torch.randn(3, 200, 5, generator=generator(1), dtype=torch.float64)
    start = torch.arange(12).expand(3, -1)

    def inertia(iterations: int) -> float:
        label, centroids = kmeans(x, 12, iterations, init=start)
        return float((x - centroids.gather(1, label[..., None].expand_as(x))).square().sum())

    course = [inertia(n) for n in range(8)]
    assert course == sorted(course, reverse=True) and course[0] > 1.05 * course[-1]
    twice = kmeans(torch.cat([x, x], 1), 12, 4, init=start)
    weighted = kmeans(x, 12, 4, torch.full((3, 200), 2.0), init=start)
    assert torch.equal(twice[0][:, :200], weighted[0])
    torch.testing.assert_close(twice[1], weighted[1], rtol=1e-12, atol=1e-12)


def test_half_precision_is_compared_in_single() -> None:
    x = (torch.randn(2, 90, 8, generator=generator(3)) + 3).bfloat16()
    label, centroids = kmeans(x, 9, 5)
    want = kmeans(x.float(), 9, 5)
    assert centroids.dtype == torch.float32 and torch.equal(label, want[0]) and torch.equal(centroids, want[1])


def test_points_far_from_zero_lose_no_digits() -> None:
    """What the keys of a layer have in common is large beside what tells them apart."""
    x = torch.randn(1, 300, 8, generator=generator(4), dtype=torch.float64)
    near = kmeans(x.float(), 20, 8)[0]
    far = kmeans((x.float().double() + 1000).float(), 20, 8)[0]  # a shift by which x keeps about 13 bits
    assert (near == far).double().mean() > 0.97


def test_points_without_weight_begin_no_cluster() -> None:
    weight = torch.zeros(2, 30)
    weight[0, ::3], weight[1, :4] = 1, 2
    draws = Draws(30, 0, weight)
    x = torch.zeros(2, 30, 1)
    first = draws.first(4, x)
    assert (weight.gather(1, first) > 0).all()
    assert all(len(set(row)) == 4 for row in first.tolist())
    assert (weight.gather(1, draws.any(500, x)) > 0).all()
    assert sorted(draws.first(30, x)[0].tolist()) == list(range(30))
    same = Draws(30, 0)
    every = same.any(2000, x)[0]
    assert torch.equal(same.first(9, x)[0], same.first(9, x)[1]) and len(set(every.tolist())) == 30
    assert not torch.equal(Draws(30, 1).first(9, x), same.first(9, x))


@prop(60)
@given(length=up_to(60), clusters=up_to(12), seed=seeds, share=st.sampled_from([0.0, 0.1, 0.3, 1.0]))
def test_fewer_distances_find_the_same(length: int, clusters: int, seed: int, share: float) -> None:
    """Some centroids move, a little or far; some of the points do not know how far they were."""
    draws = generator(seed)
    x = torch.randn(3, length, 4, generator=draws, dtype=torch.float64)
    c = torch.randn(3, clusters, 4, generator=draws, dtype=torch.float64)
    label, least = nearest(x, c)
    moved = torch.rand(3, clusters, generator=draws) < share
    step = torch.randn(c.shape, generator=draws, dtype=torch.float64)
    now = torch.where(moved[..., None], c + step * torch.rand(3, clusters, 1, generator=draws), c)
    unknown = torch.rand(3, length, generator=draws) < 0.3
    least = torch.where(unknown & moved.gather(1, label), -torch.inf, least)
    got, want = nearest_again(x, now, label, least, moved), nearest(x, now)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)


def test_fewer_distances_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []
    plain = nearest_module.nearest

    def counting(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
        done.append(x.shape[1] * centroids.shape[1])
        return plain(x, centroids)

    monkeypatch.setattr(nearest_module, "nearest", counting)
    x = torch.randn(1, 400, 4, generator=generator(0))
    c = x[:, :40].clone()
    label, least = plain(x, c)
    c[:, 3] += 0.1
    moved = torch.zeros(1, 40, dtype=torch.bool)
    moved[0, 3] = True
    nearest_again(x, c, label, least, moved)
    assert 0 < sum(done) < 400 * 40 / 5


def test_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 101, 4, generator=generator(0), dtype=torch.float64)
    c = torch.randn(3, 7, 4, generator=generator(1), dtype=torch.float64)
    want = nearest(x, c)
    tile = nearest_module._tile
    for at_once, cpu in (
        (1, True),
        (20, True),
        (7 * 101 - 1, True),
        (30, False),
        (2 * 7 * 101, False),
        (1 << 24, False),
    ):
        monkeypatch.setattr(nearest_module, "AT_ONCE", {"cpu": at_once, "other": at_once})
        monkeypatch.setattr(nearest_module, "_tile", lambda r, n, k, _, cpu=cpu: tile(r, n, k, cpu))
        problems, height = tile(3, 101, 7, cpu)
        assert problems * height * 7 <= max(7, at_once) and (not cpu or problems == 1)
        got = nearest(x, c)
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-12)
    square = (x[:, :, None] - c[:, None]).square().sum(-1)
    torch.testing.assert_close(want[1] + x.square().sum(-1), square.amin(-1), rtol=1e-9, atol=1e-9)


@prop(40)
@given(length=up_to(30), clusters=up_to(6), seed=seeds, weighted=st.booleans(), layout=st.integers(0, 2))
def test_members_and_their_means(length: int, clusters: int, seed: int, weighted: bool, layout: int) -> None:
    """Also of points that lie within a larger tensor, which is read in place."""
    draws = generator(seed)
    room = torch.randn(3, length + 9, 5, generator=draws, dtype=torch.float64)
    x = {0: room[:, 4 : 4 + length], 1: room[:, :length].contiguous(), 2: room[:, :length].mT.contiguous().mT}[layout]
    label = torch.randint(clusters, (3, length), generator=draws)
    weight = torch.randint(0, 3, (3, length), generator=draws).double() if weighted else None
    groups = group(label, clusters, weight)
    got = means(x, groups, weight)
    for r in range(3):
        assert groups.members[r].tolist() == torch.bincount(label[r], minlength=clusters).tolist()
        for i in range(clusters):
            own = [n for n in range(length) if label[r, n] == i]
            begin = int(groups.offset[r, i])
            assert groups.order[r, begin : begin + len(own)].tolist() == own
            w = [Fraction(1) if weight is None else Fraction(weight[r, n].item()) for n in own]
            assert groups.count[r, i] == float(sum(w))
            for d in range(5):
                total = sum(a * Fraction(x[r, n, d].item()) for a, n in zip(w, own, strict=True))
                assert got[r, i, d].item() == pytest.approx(float(total / sum(w)) if sum(w) else 0.0, abs=1e-12)


def test_bad_arguments_are_named() -> None:
    x = torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match="clusters must be a whole number of at least 1, got 0"):
        kmeans(x, 0)
    with pytest.raises(ValueError, match="iterations must be a whole number of at least 0, got -1"):
        kmeans(x, 1, -1)
