"""Multipole attention against a literal double loop, and where it must equal ordinary attention."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from attend_samples import Case, cases, literal_multipole, random_case
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.multipole import attend as module
from quickmerge.multipole.attend import attend, compute, row_bounds
from quickmerge.multipole.clusters import Clusters

budgets = st.integers(0, 30)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want.double(), rtol=tolerance, atol=tolerance)


@prop(90)
@given(seeds, st.sampled_from(("budget", "top_p")), st.booleans(), st.floats(0.05, 1.0), st.booleans())
def test_equals_the_paper_key_by_key(seed: int, select: str, replacement: bool, top_p: float, far: bool) -> None:
    case = random_case(seed)
    case = replace(case, settings=replace(case.settings, select=select, replacement=replacement, top_p=top_p))
    if far:
        case = replace(case, far=torch.randn(case.query.shape, generator=generator(seed), dtype=torch.float64))
    want, rows = literal_multipole(case)
    got, counted = case.run_and_count()
    assert got.dtype == torch.float64
    close(got, want)
    assert torch.equal(counted, rows)


@prop(30)
@given(seeds, st.booleans())
def test_the_correction_for_spread_equals_its_formula(seed: int, far: bool) -> None:
    case = random_case(seed, spread=True)
    if far:
        case = replace(case, far=torch.randn(case.query.shape, generator=generator(seed), dtype=torch.float64))
    want, rows = literal_multipole(case)
    got, counted = case.run_and_count()
    close(got, want, 1e-5)  # clusters hold their spread in float32
    assert torch.equal(counted, rows)


def bounded(case: Case, softcap: float | None, sinks: bool, seed: int = 0) -> Case:
    """The same call by a model that bounds its logits, has sinks, or does both."""
    learned = torch.randn(case.query.shape[1], generator=generator(seed)) * 2
    return replace(case, softcap=softcap, sinks=learned if sinks else None)


@prop(60)
@given(seeds, st.sampled_from((None, 0.5, 2.0, 30.0)), st.booleans(), st.booleans(), st.booleans())
def test_bounded_logits_and_sinks_equal_their_formula(
    seed: int, softcap: float | None, sinks: bool, spread: bool, replacement: bool
) -> None:
    case = bounded(random_case(seed, spread=spread), softcap, sinks, seed)
    case = replace(case, settings=replace(case.settings, replacement=replacement))
    want, rows = literal_multipole(case)
    got, counted = case.run_and_count()
    close(got, want, 1e-5 if spread else 1e-10)  # clusters hold their spread in float32
    assert torch.equal(counted, rows)
    everything = case.run(budget=case.clusters.width)
    close(everything, case.dense())
    if sinks and bool((everything != 0).any()):  # a sink takes weight from every key
        assert not torch.allclose(everything, replace(case, sinks=None).run(budget=case.clusters.width))


@prop(40)
@given(seeds, st.sampled_from((torch.float32, torch.bfloat16)))
def test_lower_precision_is_summed_in_float32(seed: int, dtype: torch.dtype) -> None:
    case = random_case(seed, dtype=dtype)
    got = case.run()
    assert got.dtype == dtype
    # What the numbers that are there come to, with centroids as they are held.
    wide = replace(
        case,
        query=case.query.double(),
        keys=case.keys.double(),
        values=case.values.double(),
        clusters=replace(case.clusters, key=case.clusters.key.double(), value=case.clusters.value.double()),
    )
    close(got, wide.run(), 1e-4 if dtype == torch.float32 else 2e-2)


def every_key(case: Case) -> Tensor:
    """Labels with which each key is its own cluster."""
    own = torch.arange(case.clusters.width).expand_as(case.clusters.labels)
    return torch.where(case.clusters.labels >= 0, own, -1)


@prop(30)
@given(cases(), budgets)
def test_keys_that_are_their_own_clusters_give_dense_attention(case: Case, budget: int) -> None:
    alone = case.with_labels(every_key(case), case.clusters.width)
    close(alone.run(budget=budget), case.dense())
    close(alone.run(budget=budget, select="top_p", top_p=0.7), case.dense())


@prop(30)
@given(cases(), budgets)
def test_clusters_of_equal_keys_give_dense_attention(case: Case, budget: int) -> None:
    keys, values = case.keys.clone(), case.values.clone()
    for r, start in enumerate(case.clusters.start.tolist()):
        length = sum(block.length for block in case.clusters.blocks[r])
        labels = case.clusters.labels[r, :, :length].long()
        for x in (keys, values):
            proto = torch.randn(x.shape[1], len(case.clusters), x.shape[-1], dtype=x.dtype, generator=generator(1))
            x[r, :, start : start + length] = proto.gather(1, labels[..., None].expand(-1, -1, x.shape[-1]))
    alike = replace(case, keys=keys, values=values)
    alike = alike.with_labels(case.clusters.labels, len(case.clusters), spread=True)
    for each in (alike, bounded(alike, 2.0, True)):
        close(each.run(budget=budget), each.dense())
        close(each.run(budget=budget, variance=True), each.dense())


@prop(30)
@given(cases(), st.booleans())
def test_a_budget_for_all_keys_gives_dense_attention(case: Case, replacement: bool) -> None:
    for more in ({}, {"select": "top_p", "top_p": 1.0}):  # the second way chooses and fetches even so
        got, rows = case.run_and_count(budget=case.clusters.width, replacement=replacement, **more)
        close(got, case.dense())
        held = torch.where(case.clusters.count > 0, case.clusters.members, 0).sum(-1, keepdim=True)
        assert torch.equal(rows, held.expand_as(rows))


@prop(30)
@given(cases(), seeds)
def test_the_order_of_clustered_keys_does_not_matter(case: Case, seed: int) -> None:
    keys, values, labels = case.keys.clone(), case.values.clone(), case.clusters.labels.clone()
    size = case.sizes().float()
    mixed = size.clone()
    for r, start in enumerate(case.clusters.start.tolist()):
        length = sum(block.length for block in case.clusters.blocks[r])
        order = torch.randperm(length, generator=generator(seed + r))
        for x in (keys, values):
            x[r, :, start : start + length] = x[r, :, start + order]
        labels[r, :, :length] = labels[r][:, order]
        mixed[r, start : start + length] = mixed[r, start + order]
    other = replace(case, keys=keys, values=values, size=mixed).with_labels(labels, len(case.clusters))
    close(other.run(), case.run())


@prop(30)
@given(cases(), st.booleans(), budgets)
def test_nothing_selected_or_nothing_left_is_no_trouble(case: Case, replacement: bool, budget: int) -> None:
    empty = replace(case, size=torch.zeros(case.keys.shape[0], case.keys.shape[2]))
    empty = empty.with_labels(case.clusters.labels, len(case.clusters))
    for each in (case, empty):
        for select in ("budget", "top_p"):
            got = each.run(replacement=replacement, budget=budget, select=select)
            assert torch.isfinite(got).all()
            if each is empty:
                assert not got.any()
    if case.sizes()[:, -case.query.shape[2] :].all():
        got, rows = case.run_and_count(replacement=False, budget=0)
        assert not rows.any()


@prop(40)
@given(cases(groups=(1,)))
def test_heads_of_their_own_are_served_one_by_one(case: Case) -> None:
    together = case.run()
    for head in range(case.keys.shape[1]):
        here = slice(head, head + 1)
        alone = replace(
            case, query=case.query[:, here], keys=case.keys[:, here], values=case.values[:, here]
        ).with_labels(case.clusters.labels[:, here], len(case.clusters))
        close(together[:, :, here], alone.run())


@prop(40)
@given(cases(groups=(1,)), st.integers(2, 4))
def test_heads_that_ask_alike_are_answered_alike(case: Case, group: int) -> None:
    many = replace(case, query=case.query.repeat_interleave(group, 1))
    close(many.run(), case.run().repeat_interleave(group, 2))


@prop(30)
@given(cases(rows=(2, 3)))
def test_a_batch_equals_its_rows(case: Case) -> None:
    together, counted = case.run_and_count()
    for r in range(len(together)):
        got, rows = case.row(r).run_and_count()
        close(together[r : r + 1], got)
        assert torch.equal(counted[r : r + 1], rows)


@prop(30)
@given(cases(queries=(2, 3, 5)))
def test_each_new_token_sees_what_it_would_see_alone(case: Case) -> None:
    together, n, q = case.run(), case.keys.shape[2], case.query.shape[2]
    for j in range(q):
        seen = n - q + j + 1
        size = None if case.size is None else case.size[:, :seen]
        alone = replace(
            case,
            query=case.query[:, :, j : j + 1],
            keys=case.keys[:, :, :seen],
            values=case.values[:, :, :seen],
            size=size,
        )
        close(together[:, j : j + 1], alone.run())


@prop(30)
@given(cases(queries=(3, 5)), budgets)
def test_queries_served_in_turns_are_served_alike(case: Case, budget: int) -> None:
    want = case.run_and_count(budget=budget)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_BYTES", 1)
        got = case.run_and_count(budget=budget)
    close(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_memory_stays_bounded_for_many_queries() -> None:
    """Keys fetched for each of 100 queries would take a hundred times as much as for one."""
    seen: list[int] = []

    def note(x: Tensor, index: Tensor) -> Tensor:
        seen.append(index.numel() * x.shape[-1] * x.element_size())
        return real(x, index)

    keys, values, draws = torch.randn(1, 8, 2200, 128), torch.randn(1, 8, 2200, 128), generator(0)
    labels = torch.randint(128, (1, 8, 2048), generator=draws)
    made = Clusters.from_labels(keys, values, labels, torch.tensor([10]), 128)
    case = replace(random_case(0), query=torch.randn(1, 32, 100, 128), keys=keys, values=values, size=None)
    case = replace(case, clusters=made, scaling=None, settings=replace(case.settings, sink=10, budget=512))
    with pytest.MonkeyPatch.context() as patch:
        real = module.rows_at
        patch.setattr(module, "rows_at", note)
        case.run()
    assert sum(seen) > 2 * module.TILE_BYTES > 4 * max(seen)


@prop(30)
@given(cases())
def test_the_layout_of_the_cache_does_not_matter(case: Case) -> None:
    want = case.run()
    b, h, n, _ = case.keys.shape
    roomy = [
        torch.cat([x, torch.full((b, h, 7, x.shape[-1]), torch.nan)], 2)[:, :, :n] for x in (case.keys, case.values)
    ]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (case.keys, case.values)]
    for keys, values in (roomy, turned):
        close(replace(case, keys=keys, values=values).run(), want)


def test_one_size_for_all_is_like_none() -> None:
    for seed in range(20):
        case = random_case(seed, sizes=False)
        ones = torch.ones(case.keys.shape[0], case.keys.shape[2])
        close(replace(case, size=ones).run(), replace(case, size=None).run())


def fixed() -> Case:
    case = random_case(3, rows=(2,), heads=(2,), groups=(2,), queries=(2,), sizes=True)
    return case


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"query": c.query[:, :3]}, "query must have a multiple of the 2 key-value heads, got 3"),
        (lambda c: {"query": c.query[:1]}, "query must match keys"),
        (lambda c: {"values": c.values[:, :, 1:]}, "values must match keys"),
        (lambda c: {"size": c.sizes()[:, 1:]}, "size must match keys"),
        (lambda c: {"keys": c.keys[:, :1], "values": c.values[:, :1]}, "clusters must match keys"),
        (lambda c: {"keys": c.keys[:, :, :5], "values": c.values[:, :, :5], "size": None}, "clusters must end before"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: Any, message: str) -> None:
    case = fixed()
    with pytest.raises(ValueError, match=message):
        replace(case, **change(case)).run()


def test_spread_must_have_been_measured() -> None:
    case = fixed()
    with pytest.raises(ValueError, match="variance must be False"):
        case.run(variance=True, budget=1)


def test_default_scaling_is_that_of_the_head() -> None:
    case = replace(fixed(), scaling=None)
    want = case.run()
    close(replace(case, scaling=case.query.shape[-1] ** -0.5).run(), want)
    got = attend(case.query, case.keys, case.values, case.size, case.clusters, case.settings)
    assert torch.equal(got, want)


COMPILED = [
    (5, {}),
    (16, {"select": "top_p", "top_p": 0.5}),
    (2, {"budget": 100}),
    (7, {"replacement": False}),
]


def compiled(backend: str, seed: int, change: dict[str, Any]) -> None:
    case = random_case(seed, dtype=torch.float32)
    case = replace(case, settings=replace(case.settings, **{"budget": 6, **change}))
    bounds = row_bounds(case.clusters, case.settings.sink)
    given_ = (case.query, case.keys, case.values, case.size, case.clusters, case.settings, bounds, case.scaling)
    torch._dynamo.reset()
    got, rows = torch.compile(compute, fullgraph=True, backend=backend)(*given_)
    close(got, case.run(), 1e-5)
    assert torch.equal(rows, case.run_and_count()[1])


@pytest.mark.parametrize(("seed", "change"), COMPILED[:2])
def test_it_is_one_graph(seed: int, change: dict[str, Any]) -> None:
    compiled("eager", seed, change)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "change"), COMPILED)
def test_it_compiles(seed: int, change: dict[str, Any]) -> None:
    compiled("inductor", seed, change)


@prop(20)
@given(seeds)
def test_gradients_are_those_of_the_formula(seed: int) -> None:
    """Against finite differences, at places where the choice does not change."""
    case = random_case(seed, rows=(1,), queries=(1, 2), temperature=0.3)
    rng = Random(seed)
    probe = torch.randn(case.query.shape, generator=generator(rng.getrandbits(31)), dtype=torch.float64)

    def value(query: Tensor) -> Tensor:
        return replace(case, query=query).run().sum()

    query = case.query.clone().requires_grad_()
    (slope,) = torch.autograd.grad(value(query), query)
    step = 1e-6
    want = (value(case.query + step * probe) - value(case.query - step * probe)) / (2 * step)
    torch.testing.assert_close((slope * probe).sum(), want, rtol=1e-4, atol=1e-6)
