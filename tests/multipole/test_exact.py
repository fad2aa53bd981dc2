"""Columns outside the clusters, and softmaxes put together from parts."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.multipole.exact import Part, Piece, around, between, exact, finish, merge, piece


def parts(seed: int, count: int) -> tuple[Tensor, Tensor, list[Part]]:
    """Logits and values, and the parts of a softmax over them; some of them empty."""
    rng, draws = Random(seed), generator(seed)
    logits = torch.randn(3, 20, generator=draws, dtype=torch.float64) * rng.choice((1, 30))
    values = torch.randn(20, 4, generator=draws, dtype=torch.float64)
    cuts = sorted(rng.randint(0, 20) for _ in range(count - 1))
    out = []
    for a, b in zip([0, *cuts], [*cuts, 20], strict=True):
        nothing = torch.full((3, 1), torch.finfo(torch.float64).min, dtype=torch.float64)
        top = logits[:, a:b].amax(-1, keepdim=True) if b > a else nothing
        weight = (logits[:, a:b] - top).exp()
        out.append(Part(weight @ values[a:b], top, weight.sum(-1, keepdim=True)))
    return logits, values, out


@prop(60)
@given(seeds)
def test_parts_merge_in_any_order_and_grouping(seed: int) -> None:
    logits, values, (a, b, c, d) = parts(seed, 4)
    want = logits.softmax(-1) @ values
    for merged in (
        merge([a, b, c, d]),
        merge([d, b, a, c]),
        merge([merge([a, b]), merge([c, d])]),
        merge([a, merge([b, merge([c, d])])]),
        merge([merge([merge([d, c]), b]), a]),
    ):
        torch.testing.assert_close(finish(merged), want, rtol=1e-10, atol=1e-10)


def test_parts_of_nothing_give_zero() -> None:
    none = Part(torch.zeros(2, 3), torch.full((2, 1), torch.finfo(torch.float32).min), torch.zeros(2, 1))
    assert torch.equal(finish(merge([none, none])), torch.zeros(2, 3))
    some = Part(torch.ones(2, 3), torch.full((2, 1), -50.0), torch.ones(2, 1))
    assert torch.equal(finish(merge([none, some])), torch.ones(2, 3))
    assert torch.equal(finish(merge([some, none, some])), torch.ones(2, 3))


def literal(query: Tensor, keys: Tensor, values: Tensor, size: Tensor, columns: list[set[int]]) -> Tensor:
    """Attention of each new token to those of the given columns that it sees."""
    b, h, q, g, _ = query.shape
    n, out = keys.shape[2], torch.zeros(b, h, q, g, values.shape[-1], dtype=torch.float64)
    for r, k, j, i in torch.cartesian_prod(*(torch.arange(x) for x in (b, h, q, g))).tolist():
        seen = [c for c in sorted(columns[r]) if c <= n - q + j and size[r, c] > 0]
        if seen:
            weight = (keys[r, k, seen].double() @ query[r, k, j, i] + size[r, seen].double().log()).softmax(0)
            out[r, k, j, i] = weight @ values[r, k, seen].double()
    return out


@prop(80)
@given(seeds)
def test_sink_and_buffer_of_rows_of_any_length(seed: int) -> None:
    rng, draws = Random(seed), generator(seed)
    b, h, q, g, n = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 4), rng.randint(1, 3), rng.randint(8, 30)
    bounds = []
    for _ in range(b):
        # A row with nothing clustered may be so short that its new tokens lie where others have their sink.
        first = rng.randint(0, n - q)
        start = first + rng.randint(0, 5)
        bounds.append((first, start, rng.randint(start, n - q) if start <= n - q else start))
    bounds = [bounds[0]] * b if rng.random() < 0.4 else bounds
    query = torch.randn(b, h, q, g, 5, generator=draws, dtype=torch.float64)
    keys, values = (torch.randn(b, h, n, w, generator=draws, dtype=torch.float64) for w in (5, 3))
    size = torch.randint(0, 3, (b, n), generator=draws).float() if rng.random() < 0.5 else None
    columns = [{c for c in range(n) if first <= c < start or c >= end} for first, start, end in bounds]
    told = torch.ones(b, n) if size is None else size
    want = literal(query, keys, values, told, columns)
    pieces = around(keys, values, size, q, torch.float64, bounds)
    torch.testing.assert_close(finish(exact(query, pieces)), want, rtol=1e-10, atol=1e-10)
    some = slice(q // 2, q)
    got = finish(exact(query[:, :, some], [each.of(some) for each in pieces]))
    torch.testing.assert_close(got, want[:, :, some], rtol=1e-10, atol=1e-10)
    first = torch.tensor([row[0] for row in bounds])
    whole = between(keys, values, size, q, torch.float64, int(first.min()), n, first)
    want = literal(query, keys, values, told, [set(range(begin, n)) for begin, _, _ in bounds])
    torch.testing.assert_close(finish(exact(query, [whole])), want, rtol=1e-10, atol=1e-10)


def test_rows_that_are_alike_are_not_copied() -> None:
    keys = torch.randn(2, 3, 20, 4)
    for each in around(keys, keys, None, 1, torch.float32, [(0, 4, 12)] * 2):
        assert each.key.untyped_storage().data_ptr() == keys.untyped_storage().data_ptr()


def test_rows_of_different_length_are_not_read_from_where_the_longest_begins() -> None:
    keys = torch.randn(2, 1, 1000, 4)
    (fetched,) = around(keys, keys, None, 1, torch.float32, [(0, 4, 990), (950, 954, 995)])
    assert len(fetched) == 14


def test_a_key_of_size_zero_is_none_even_if_its_logit_overflows() -> None:
    key, value = torch.tensor([[[[1e30, 0.0], [0.0, 1.0]]]]), torch.tensor([[[[7.0], [3.0]]]])
    query = torch.full((1, 1, 1, 1, 2), 1e30)
    told = piece(key, value, torch.tensor([[[[[0.0, 2.0]]]]]), None, torch.float32)
    assert float(finish(exact(query, [told]))) == 3.0
    assert exact(query, [Piece(key, value, hidden=torch.ones(1, 1, 1, 1, 2, dtype=torch.bool))]).total.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_precision_is_that_of_the_query(dtype: torch.dtype) -> None:
    keys = torch.randn(1, 1, 6, 4).to(dtype)
    precise = torch.promote_types(dtype, torch.float32)
    got = exact(torch.randn(1, 1, 1, 2, 4, dtype=precise), [Piece(keys, keys)])
    assert got.out.dtype == got.total.dtype == precise
