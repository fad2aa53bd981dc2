"""What the kernels say: in Triton's interpreter, or on a GPU where there is one and nobody asked for the former.

`test_triton` runs this file in a process of its own for the interpreter, and `benchmarks/gpu.py` for a GPU.
"""

from __future__ import annotations

import os
from dataclasses import fields, is_dataclass, replace
from random import Random
from typing import Any

import pytest
import torch
from attend_samples import Case, literal_multipole, random_case
from hypothesis import given
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.multipole import Multipole, triton_decode
from quickmerge.multipole.attend import attend_and_count
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.triton_decode import attend_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" or not torch.cuda.is_available()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def there(given: Any) -> Any:
    """The same on the device of the kernels: tensors with their strides, and what holds tensors."""
    if INTERPRETED:
        return given
    if isinstance(given, Tensor):
        whole = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype, device=DEVICE)
        return whole.copy_(given)
    if is_dataclass(given) and not isinstance(given, type):
        return replace(given, **{each.name: there(getattr(given, each.name)) for each in fields(given)})
    return given


def kernels(case: Case, told: Multipole | None = None, **more: Any) -> tuple[Tensor, Tensor]:
    """What the kernels make of a case, here again: the output, and how many clustered rows were read."""
    case = there(case)
    more = {name: there(each) for name, each in more.items()}
    got, counted = attend_triton(
        case.query,
        case.keys,
        case.values,
        case.size,
        case.clusters,
        told or case.settings,
        scaling=case.scaling,
        **more,
    )
    return got.cpu(), counted.cpu()


def both(case: Case, query_for_centroids: Tensor | None = None, **changes: Any) -> tuple[Tensor, Tensor]:
    """The kernels' output after it was compared with torch's, and how much was read."""
    told = replace(case.settings, **changes)
    want, rows = attend_and_count(
        case.query, case.keys, case.values, case.size, case.clusters, told, scaling=case.scaling,
        query_for_centroids=query_for_centroids,
    )  # fmt: skip
    got, counted = kernels(case, told, query_for_centroids=query_for_centroids)
    assert got.dtype == want.dtype and got.shape == want.shape
    assert torch.equal(counted, rows)
    tolerance = CLOSE[case.query.dtype]
    # by the largest value that takes part, as rounding is
    torch.testing.assert_close(got.float(), want.float(), rtol=tolerance, atol=tolerance * float(want.abs().max() + 1))
    return got, counted


def large(
    seed: int,
    b: int = 2,
    h: int = 2,
    g: int = 4,
    n: int = 190,
    d: int = 80,
    dv: int = 80,
    clusters: int = 40,
    dtype: torch.dtype = torch.float32,
    sized: bool = False,
) -> Case:
    """Rows of different length, with so many columns and clusters that each program has several tiles of them."""
    draws = generator(seed)
    query, keys = torch.randn(b, h * g, 1, d, generator=draws), torch.randn(b, h, n, d, generator=draws)
    values = torch.randn(b, h, n, dv, generator=draws)
    start, m = torch.arange(b) * 7 + 5, n - 7 * b - 20
    labels = torch.randint(clusters, (b, h, m), generator=draws)
    for row in range(1, b):
        labels[row, :, m - 31 * row :] = -1
    size = None
    if sized:
        size = torch.randint(0, 4, (b, n), generator=draws).float()
        size[:, -1] = 1
    query, keys, values = (2 * query).to(dtype), keys.to(dtype), values.to(dtype)
    made = Clusters.from_labels(keys, values, labels, start, clusters, size, spread=True)
    return Case(query, keys, values, size, made, Multipole(sink=5, budget=100), None)


@prop(16)
@given(seeds)
def test_equals_torch(seed: int) -> None:
    rng = Random(seed)
    case = random_case(seed, dtype=torch.float32, queries=(1,), spread=rng.random() < 0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_decode, "_processors", lambda device: rng.choice((1, 3, 8)))
        both(case, replacement=rng.random() < 0.7, select=rng.choice(("budget", "top_p")), top_p=rng.random() or 1.0)


@prop(6)
@given(seeds)
def test_equals_the_paper_written_out(seed: int) -> None:
    rng = Random(seed)
    case = random_case(seed, dtype=torch.float32, queries=(1,), spread=rng.random() < 0.3)
    want, rows = literal_multipole(case)
    got, counted = kernels(case)
    assert torch.equal(counted, rows)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processors", "variance", "shape"),
    [
        (1, False, {"g": 1, "h": 3}),
        (8, False, {"g": 3, "d": 64, "dv": 96}),
        (8, True, {"g": 17, "h": 1}),
        (8, False, {"g": 4, "d": 128, "dv": 128, "sized": True}),
        (1, True, {"g": 2, "d": 20, "dv": 8, "clusters": 150, "n": 500}),
        (40, False, {"b": 3, "h": 1, "d": 256, "dv": 256}),
    ],
)
def test_equals_torch_at_the_sizes_of_models(
    processors: int, variance: bool, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_decode, "_processors", lambda device: processors)
    both(large(3, **shape), variance=variance)


@pytest.mark.parametrize("budget", [0, 1, 155, 156])
@pytest.mark.parametrize("replacement", [True, False])
def test_nothing_and_everything_is_selected(budget: int, replacement: bool) -> None:
    case = large(5, sized=True)
    assert case.clusters.width == 156
    _, counted = both(case, budget=budget, replacement=replacement)
    assert int(counted.max()) <= budget


@pytest.mark.parametrize("select", ["budget", "top_p"])
def test_a_budget_for_everything_is_dense(select: str) -> None:
    case = large(5, sized=True)
    got, _ = both(case, select=select, top_p=1.0, budget=1000)
    torch.testing.assert_close(got.double(), case.dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, sized: bool) -> None:
    case = large(6, dtype=dtype, sized=sized)
    both(case)
    clusters = replace(case.clusters, key=case.clusters.key.float(), value=case.clusters.value.float())
    both(replace(case, clusters=clusters))


def test_any_strides() -> None:
    case = large(9)
    b, h, n, d = case.keys.shape
    buffer = torch.full((b, 2 * n, h, d), torch.nan)
    keys, values = buffer.clone()[:, 3 : n + 3].transpose(1, 2), buffer.clone()[:, :n].transpose(1, 2)
    keys.copy_(case.keys), values.copy_(case.values)
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    got, _ = both(replace(case, query=query, keys=keys, values=values, size=torch.ones(b, 2 * n)[:, :n]))
    torch.testing.assert_close(got, both(case)[0], rtol=0, atol=0)


def test_another_query_for_the_centroids() -> None:
    case = large(10)
    got, _ = both(case, torch.randn(case.query.shape, generator=generator(1)))
    assert not torch.allclose(got, both(case)[0], atol=1e-3)


def test_a_row_that_sees_nothing() -> None:
    case = large(11, sized=True)
    assert case.size is not None
    size = torch.cat([torch.zeros_like(case.size[:1]), case.size[1:]])
    labels = case.clusters.labels
    case = replace(case, size=size).with_labels(labels, len(case.clusters))
    got, _ = both(case)
    assert not got[0].any() and got[1:].any()


def test_a_batch_equals_its_rows() -> None:
    case = large(12, b=3, h=1)
    got, _ = both(case)
    for row in range(3):
        torch.testing.assert_close(got[row : row + 1], both(case.row(row))[0], rtol=1e-5, atol=1e-5)


def test_nothing_behind_the_cache_is_read() -> None:
    """Not even if clusters are told of that are no longer there, for which `attend` cannot ask the device in time."""
    case = large(14, b=1)
    keys, values = case.keys.clone(), case.values.clone()
    keys[:, :, 100:], values[:, :, 100:] = torch.nan, torch.nan
    told = replace(case.settings, budget=10_000)
    for chosen in (told, replace(told, select="top_p", top_p=1.0)):
        held = there(keys)[:, :, :100], there(values)[:, :, :100]
        out, _ = attend_triton(there(case.query), *held, None, there(case.clusters), chosen)
        assert out.isfinite().all()


def test_variance_needs_the_spread() -> None:
    case = large(13)
    with pytest.raises(ValueError, match="variance must be False"):
        both(replace(case, clusters=replace(case.clusters, spread=None)), variance=True)
