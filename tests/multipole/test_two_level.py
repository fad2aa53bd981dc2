"""Two levels of clusters: what coarse clusters are, and attention through them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attend_samples import Case, random_case
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.multipole import exact as two_level
from quickmerge.multipole.attend import attend_and_count, compute, row_bounds
from quickmerge.multipole.clustering import cluster, extend
from quickmerge.multipole.clusters import Block, Clusters, Summary
from quickmerge.multipole.exact import coarsen
from quickmerge.multipole.settings import Multipole


def sample(seed: int, coarse: float = 0.2, spread: bool = False, **options: object) -> tuple[Case, Clusters]:
    case = random_case(seed, spread=spread, **options)  # type: ignore[arg-type]
    case = replace(case, settings=replace(case.settings, ratio=1.0, coarse=coarse))
    return case, coarsen(case.clusters, case.settings)


def run(case: Case, coarse: Clusters | None, **settings: object) -> tuple[Tensor, Tensor]:
    told = replace(case.settings, **settings)  # type: ignore[arg-type]
    given_ = (case.query, case.keys, case.values, case.size, case.clusters, told)
    return attend_and_count(*given_, scaling=case.scaling, query_for_centroids=case.far, coarse=coarse)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


def keys_of(fine: Clusters, coarse: Clusters, row: int, head: int, i: int) -> list[int]:
    """Clustered columns, counted from the row's start, that coarse cluster ``i`` stands for."""
    parent, label = coarse.labels[row, head].tolist(), fine.labels[row, head].tolist()
    return [m for m in range(fine.width) if label[m] >= 0 and parent[label[m]] == i]


def assert_coarse(case: Case, coarse: Clusters) -> None:
    """Every coarse cluster is worth the keys that it stands for, and lists its fine clusters."""
    fine, sizes = case.clusters, case.sizes()
    b, h, c = coarse.count.shape
    assert torch.equal(coarse.count.sum(-1), fine.count.sum(-1))
    assert torch.equal(coarse.members.sum(-1), (fine.count > 0).sum(-1))
    for r, k, i in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(c)).tolist():
        here = torch.tensor(keys_of(fine, coarse, r, k, i), dtype=torch.long) + fine.start[r]
        weight = sizes[r, here]
        assert float(coarse.count[r, k, i]) == float(weight.sum())
        children = [j for j in range(len(fine)) if coarse.labels[r, k, j] == i]
        assert int(coarse.members[r, k, i]) == len(children)
        at = int(coarse.offset[r, k, i])
        assert coarse.order[r, k, at : at + len(children)].tolist() == children
        if not weight.sum():
            continue
        centre = (weight[:, None] * case.keys[r, k, here]).sum(0) / weight.sum()
        close(coarse.key[r, k, i], centre)
        close(coarse.value[r, k, i], (weight[:, None] * case.values[r, k, here]).sum(0) / weight.sum())
        if coarse.spread is not None:
            away = (case.keys[r, k, here] - centre).square().sum(-1)
            close(coarse.spread[r, k, i], (weight * away).sum() / weight.sum(), 1e-4)


@prop(25)
@given(seeds, st.booleans())
def test_coarse_clusters_are_worth_their_keys(seed: int, spread: bool) -> None:
    case, coarse = sample(seed, spread=spread)
    assert_coarse(case, coarse)
    assert (coarse.spread is None) == (not spread)
    none = case.clusters.count == 0
    assert (coarse.labels[none] == -1).all() and (coarse.labels[~none] >= 0).all()


def grown(seed: int, length: int, settings: Multipole) -> tuple[Tensor, Tensor, list[Clusters]]:
    """A cache of two rows, clustered, and then extended several times."""
    draws = generator(seed)
    keys, values = (torch.randn(2, 2, length, 4, generator=draws, dtype=torch.float64) for _ in range(2))
    start, end = torch.tensor([2, 13]), torch.tensor([70, 37])
    steps = [cluster(keys, values, None, start, end, settings)]
    assert steps[0] is not None
    made = [steps[0]]
    while int(end.max()) + 8 <= length:
        end = end + 8
        made.append(extend(made[-1], keys, values, None, end, settings))
    return keys, values, made


def test_each_block_has_coarse_clusters_of_its_own_and_keeps_them() -> None:
    settings = Multipole(ratio=0.25, coarse=0.08, block=32, interval=8, seed=3)
    keys, values, made = grown(0, 140, settings)
    assert max(len(row) for row in made[-1].blocks) >= 4
    before = None
    for fine in made:
        coarse = coarsen(fine, settings, before)
        alone = coarsen(fine, settings)
        for name in ("key", "value", "count", "members", "order", "offset", "labels"):
            assert torch.equal(getattr(coarse, name), getattr(alone, name)), name
        assert coarse.blocks == alone.blocks
        case = replace(
            random_case(0), keys=keys, values=values, size=None, clusters=fine, settings=replace(settings, sink=2)
        )
        assert_coarse(case, coarse)
        for row, (own, upper) in enumerate(zip(fine.blocks, coarse.blocks, strict=True)):
            for block, above in zip(own, upper, strict=True):
                assert (above.first, above.length) == (block.cluster, block.clusters)
                assert above.clusters == min(block.clusters, max(1, int(block.length * 0.08)))
                parent = coarse.labels[row, :, above.first : above.first + above.length]
                there = parent[parent >= 0]
                assert (there >= above.cluster).all() and (there < above.cluster + above.clusters).all()
        before = (fine, coarse)


def test_closed_blocks_are_taken_over_and_not_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Multipole(ratio=0.25, coarse=0.08, block=32, interval=8)
    _, _, made = grown(1, 130, settings)
    blocks = [[len(row) for row in fine.blocks] for fine in made]
    step = next(i for i in range(len(made) - 1) if min(blocks[i]) > 1 and blocks[i] == blocks[i + 1])
    coarse, anew = coarsen(made[step], settings), []
    real = two_level._coarse_block

    def note(fine: Clusters, row: int, block: Block, settings: Multipole) -> Summary:
        anew.append(row)
        return real(fine, row, block, settings)

    monkeypatch.setattr(two_level, "_coarse_block", note)
    coarsen(made[step + 1], settings, (made[step], coarse))
    assert anew == [0, 1]  # the open block of each row


def test_rows_are_picked_at_both_levels() -> None:
    settings = Multipole(ratio=0.25, coarse=0.08, block=32, interval=8)
    _, _, made = grown(1, 130, settings)
    again = made[-1].select_rows(torch.tensor([1, 1, 0]))
    picked = coarsen(made[-1], settings).select_rows(torch.tensor([1, 1, 0]))
    assert torch.equal(picked.key, coarsen(again, settings).key)


def literal(case: Case, coarse: Clusters) -> tuple[Tensor, Tensor]:
    """Two levels for one query and key-value head after the other."""
    told, fine, sizes = case.settings, case.clusters, case.sizes()
    b, hq, q, d = case.query.shape
    h, n = case.keys.shape[1:3]
    g = hq // h
    out = torch.zeros(b, q, hq, case.values.shape[-1], dtype=torch.float64)
    rows = torch.zeros(b, h, q, dtype=torch.long)
    for r, k, j in torch.cartesian_prod(torch.arange(b), torch.arange(h), torch.arange(q)).tolist():
        own = case.scale * case.query[r, k * g : k * g + g, j].double()
        start, length = int(fine.start[r]), sum(block.length for block in fine.blocks[r])

        def mass(c: Clusters, i: int, own: Tensor = own, r: int = r, k: int = k) -> Tensor:
            z = own @ c.key[r, k, i]
            if told.variance and c.spread is not None:
                z = z + own.square().sum(-1) * float(c.spread[r, k, i]) / (2 * d)
            return float(c.count[r, k, i]) * z.exp()

        def falling(c: Clusters, among: list[int], total: Tensor, r: int = r, k: int = k) -> list[tuple[int, Tensor]]:
            share = {i: (mass(c, i) / total).mean() / float(c.count[r, k, i]) for i in among}
            return [(i, share[i]) for i in sorted(among, key=lambda i: (-float(share[i].float()), i))]

        upper = [i for i in range(len(coarse)) if coarse.count[r, k, i] > 0]
        total = sum((mass(coarse, i) for i in upper), torch.zeros(g).double())
        opened: list[int] = []
        room = min(told.budget, len(fine))
        for i, _ in falling(coarse, upper, total):
            if int(coarse.members[r, k, i]) > room:
                break
            opened.append(i)
            room -= int(coarse.members[r, k, i])
        closed = [i for i in upper if i not in opened]
        children = [c for i in opened for c in range(len(fine)) if int(coarse.labels[r, k, c]) == i]
        total = sum((mass(fine, i) for i in children), torch.zeros(g).double())
        total = sum((mass(coarse, i) for i in closed), total)
        chosen: list[int] = []
        used, reached = 0, 0.0
        # Equal shares go to the child of the better coarse cluster, which comes first among the candidates.
        for i, share in falling(fine, children, total):
            members = int(fine.members[r, k, i])
            if used + members > told.budget or (told.select == "top_p" and reached >= told.top_p):
                break
            chosen.append(i)
            used, reached = used + members, reached + float(share) * float(fine.count[r, k, i])
        rows[r, k, j] = used
        label = fine.labels[r, k].tolist()
        columns = [c for c in range(n - q + j + 1) if c < start or c >= start + length or label[c - start] in chosen]
        columns = [c for c in columns if sizes[r, c] > 0]
        weights = [sizes[r, columns] * (own @ case.keys[r, k, columns].double().T).exp()]
        values = [case.values[r, k, columns].double()]
        if told.replacement:
            for c, left in ((fine, [i for i in children if i not in chosen]), (coarse, closed)):
                weights += [mass(c, i)[:, None] for i in left]
                values += [c.value[r, k, i, None] for i in left]
        weight, value = torch.cat(weights, 1), torch.cat(values)
        whole = weight.sum(-1, keepdim=True)
        out[r, j, k * g : k * g + g] = (weight @ value) / torch.where(whole > 0, whole, 1.0)
    return out, rows


@prop(30)
@given(seeds, st.sampled_from(("budget", "top_p")), st.booleans(), st.floats(0.05, 0.95))
def test_equals_two_levels_cluster_by_cluster(seed: int, select: str, replacement: bool, top_p: float) -> None:
    case, coarse = sample(seed)
    budget = max(1, case.settings.budget)
    told = replace(case.settings, select=select, replacement=replacement, top_p=top_p, budget=budget)
    case = replace(case, settings=told)
    want, rows = literal(case, coarse)
    got, counted = run(case, coarse)
    if select == "budget" and budget >= case.clusters.width:
        close(got, case.dense())
    else:
        close(got, want)
        assert torch.equal(counted, rows)


@prop(30)
@given(seeds)
def test_the_correction_for_spread_holds_at_both_levels(seed: int) -> None:
    case, coarse = sample(seed, spread=True)
    budget = min(max(1, case.settings.budget), max(1, case.clusters.width - 1))
    case = replace(case, settings=replace(case.settings, budget=budget))
    if budget < case.clusters.width:
        close(run(case, coarse)[0], literal(case, coarse)[0], 1e-5)


@prop(25)
@given(seeds, st.integers(0, 30), st.booleans())
def test_one_fine_cluster_each_equals_one_level(seed: int, budget: int, spread: bool) -> None:
    case = random_case(seed, spread=spread)
    labels = torch.arange(len(case.clusters)).expand(case.clusters.count.shape)
    upper = Clusters.from_labels(
        case.clusters.key, case.clusters.value, labels, torch.zeros(len(labels), dtype=torch.long), len(case.clusters)
    )
    there = case.clusters.count > 0
    coarse = replace(
        upper,
        key=case.clusters.key,
        value=case.clusters.value,
        count=case.clusters.count,
        members=there.int(),
        spread=case.clusters.spread,
    )
    for more in ({}, {"replacement": False}, {"select": "top_p", "top_p": 0.6}):
        one, two = run(case, None, budget=budget, **more), run(case, coarse, budget=budget, **more)
        close(two[0], one[0])
        assert torch.equal(two[1], one[1])


@prop(20)
@given(seeds)
def test_a_budget_for_all_keys_gives_dense_attention(seed: int) -> None:
    case, coarse = sample(seed)
    for more in ({}, {"select": "top_p", "top_p": 1.0}):  # the second way goes through both levels even so
        close(run(case, coarse, budget=case.clusters.width, **more)[0], case.dense())


@prop(30)
@given(seeds, st.booleans())
def test_without_a_budget_coarse_centroids_stand_for_all(seed: int, replacement: bool) -> None:
    case, coarse = sample(seed)
    case = replace(case, settings=replace(case.settings, budget=0, replacement=replacement))
    got, rows = run(case, coarse)
    assert not rows.any()
    close(got, literal(case, coarse)[0])


@prop(20)
@given(seeds)
def test_a_batch_equals_its_rows(seed: int) -> None:
    case, coarse = sample(seed, rows=(2, 3))
    together = run(case, coarse)[0]
    for r in range(len(together)):
        alone = case.row(r)
        if any(block.length for block in alone.clusters.blocks[0]):
            close(together[r : r + 1], run(alone, coarsen(alone.clusters, alone.settings))[0])


def test_no_coarse_centroids_without_being_asked() -> None:
    with pytest.raises(ValueError, match="coarse must be a number"):
        coarsen(random_case(1).clusters, Multipole())


def test_it_is_one_graph() -> None:
    case, coarse = sample(5)
    case = replace(case, settings=replace(case.settings, budget=5))
    given_ = (case.query, case.keys, case.values, case.size, case.clusters, case.settings)
    bounds = row_bounds(case.clusters, case.settings.sink)
    torch._dynamo.reset()
    got = torch.compile(compute, fullgraph=True, backend="eager")(*given_, bounds, case.scaling, None, coarse)[0]
    close(got, run(case, coarse)[0])


def test_no_more_fine_centroids_are_fetched_than_could_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second level is for: of N/8 fine centroids, only some of those in opened coarse clusters are read."""
    fetched: list[int] = []

    def note(x: Tensor, index: Tensor) -> Tensor:
        fetched.append(index.shape[-1])
        return real(x, index)

    keys, draws = torch.randn(1, 1, 4096, 8, generator=generator(0)), generator(1)
    settings = Multipole(ratio=1 / 8, coarse=1 / 64, budget=64, block=1024, iterations=2)
    fine = cluster(keys, keys, None, torch.tensor([0]), torch.tensor([4000]), settings)
    assert fine is not None and len(fine) == 500
    coarse = coarsen(fine, settings)
    assert len(coarse) == pytest.approx(4000 / 64, abs=5)
    real = two_level.rows_at
    monkeypatch.setattr(two_level, "rows_at", note)
    query = torch.randn(1, 1, 1, 8, generator=draws)
    _, rows = attend_and_count(query, keys, keys, None, fine, settings, coarse=coarse)
    assert 32 < int(rows) <= 64
    assert fetched == [64, 64]  # keys and values
