"""Saliency against the same definitions said slowly, one number at a time, in Python floats."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prefix_views import prefix_views
from strategies import FLOATS, alone, attention_trace, generator, numbers, padded, prop, seeds, valid_masks, views
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quickmerge.merge.tokens import (
    AttentionTrace,
    Evidence,
    TokenView,
    attention_norm,
    bidirectional_attention,
    received_attention,
)
from quickmerge.merge.tokens.saliency import BLOCK, attention_entropy, attention_from, last_rows, pool

DOUBLE = (torch.float64,)


def slow_row(trace: AttentionTrace, view: TokenView, row: int, head: int, i: int) -> dict[int, float]:
    """Softmax weights of query ``i`` over the keys that it sees."""
    group = head // (trace.query.shape[1] // trace.key.shape[1])
    query = trace.query[row, head, i].double().tolist()
    scores = {}
    for j in range(i + 1):
        near = trace.window is None or int(view.position[row, i]) - int(view.position[row, j]) < trace.window
        if bool(view.valid[row, j]) and near:
            key = trace.key[row, group, j].double().tolist()
            scores[j] = trace.scaling * math.fsum(a * b for a, b in zip(query, key, strict=True))
    top = max(scores.values())
    total = math.fsum(math.exp(s - top) for s in scores.values())
    return {j: math.exp(s - top) / total for j, s in scores.items()}


def cells(trace: AttentionTrace, view: TokenView) -> Iterator[tuple[int, int, list[int]]]:
    """Every row and head, with the row's valid tokens."""
    for row in range(view.valid.shape[0]):
        tokens = view.valid[row].nonzero().flatten().tolist()
        for head in range(trace.query.shape[1]):
            yield row, head, tokens


def slow_received(trace: AttentionTrace, view: TokenView, window: int, moment: int) -> Tensor:
    out = torch.zeros(trace.query.shape[:3], dtype=torch.float64)
    for row, head, tokens in cells(trace, view):
        voters = tokens[-window:]
        votes = [slow_row(trace, view, row, head, i) for i in voters]
        for j in tokens:
            mean = math.fsum(p.get(j, 0.0) ** moment for p in votes) / len(voters)
            out[row, head, j] = mean ** (1 / moment)
    return out


def slow_norm(trace: AttentionTrace, view: TokenView, window: int, moment: int) -> Tensor:
    """Power mean of the length of what a token adds to the outputs of the voters."""
    out = torch.zeros(trace.query.shape[:3], dtype=torch.float64)
    for row, head, tokens in cells(trace, view):
        group = head // (trace.query.shape[1] // trace.key.shape[1])
        voters = tokens[-window:]
        votes = [slow_row(trace, view, row, head, i) for i in voters]
        for j in tokens:
            value = trace.value[row, group, j].double().tolist()
            added = [math.sqrt(math.fsum((p.get(j, 0.0) * v) ** 2 for v in value)) for p in votes]
            out[row, head, j] = (math.fsum(a**moment for a in added) / len(voters)) ** (1 / moment)
    return out


@st.composite
def probed(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = DOUBLE, **kwargs: Any) -> TokenView:
    """A small fresh view with one trace."""
    kwargs = {"max_tokens": 9, "merged": False, "protect": ("none",), **kwargs}
    return draw(views(attention=1, dtypes=dtypes, **kwargs))


def as_double(trace: AttentionTrace) -> AttentionTrace:
    return replace(trace, query=trace.query.double(), key=trace.key.double(), value=trace.value.double())


moments = st.sampled_from((1, 2, 3))


@prop(60)
@given(probed(), st.integers(1, 12), moments)
def test_received_attention(view: TokenView, window: int, moment: int) -> None:
    (trace,) = view.evidence.attention
    got = received_attention(trace, view.valid, view.position, window, moment)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, slow_received(trace, view, window, moment), rtol=0, atol=1e-10)
    assert (got[~view.valid[:, None].expand_as(got)] == 0).all() and (got >= 0).all()


@prop(30)
@given(probed(max_tokens=40), st.integers(1, 45), moments)
def test_chosen_voters_vote_like_the_last_ones_where_these_are_chosen(
    view: TokenView, window: int, moment: int
) -> None:
    (trace,) = view.evidence.attention
    rows, real = last_rows(view.valid, window)
    got = attention_from(trace, torch.where(real, rows, -1), view.valid, view.position, moment)
    torch.testing.assert_close(got, slow_received(trace, view, window, moment), rtol=0, atol=1e-10)


@prop(30)
@given(probed(max_tokens=40, merged=None), st.integers(1, 45))
def test_what_a_row_receives_sums_to_one(view: TokenView, window: int) -> None:
    (trace,) = view.evidence.attention
    total = received_attention(trace, view.valid, view.position, window).sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-10)


@prop(30)
@given(probed(merged=True), st.integers(1, 12))
def test_received_attention_over_merged_tokens(view: TokenView, window: int) -> None:
    """A sliding window is counted in positions, the voters in tokens."""
    (trace,) = view.evidence.attention
    got = received_attention(trace, view.valid, view.position, window)
    torch.testing.assert_close(got, slow_received(trace, view, window, 1), rtol=0, atol=1e-10)


@prop(40)
@given(probed(), st.integers(1, 12), moments)
def test_attention_norm(view: TokenView, window: int, moment: int) -> None:
    (trace,) = view.evidence.attention
    got = attention_norm(trace, view.valid, view.position, window, moment)
    want = slow_norm(trace, view, window, moment)
    valid = view.valid[:, None].expand_as(got)
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-10)
    assert (got[~valid] == 0).all()


@prop(40)
@given(probed(merged=None), st.integers(1, 12), moments, st.integers(0, 6), st.booleans())
def test_votes_for_near_tokens_can_be_left_out(
    view: TokenView, window: int, moment: int, nearest: int, norm: bool
) -> None:
    """Counted in positions and for each row on its own; the other probabilities stay what they were."""
    (trace,) = view.evidence.attention
    measure = attention_norm if norm else received_attention
    each = nearest + torch.arange(len(view.valid))
    got = measure(trace, view.valid, view.position, window, moment, each)
    want = torch.zeros_like(got)
    for row, head, tokens in cells(trace, view):
        group = head // (trace.query.shape[1] // trace.key.shape[1])
        voters = tokens[-window:]
        votes = [slow_row(trace, view, row, head, i) for i in voters]
        for j in tokens:
            size = torch.linalg.vector_norm(trace.value[row, group, j]).item() if norm else 1.0
            far = [v.get(j, 0.0) for i, v in zip(voters, votes, strict=True)
                   if view.position[row, i] - view.position[row, j] >= each[row]]  # fmt: skip
            want[row, head, j] = size * (math.fsum(p**moment for p in far) / len(voters)) ** (1 / moment)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
    whole = measure(trace, view.valid, view.position, window, moment, nearest)
    torch.testing.assert_close(got[0], whole[0], rtol=0, atol=1e-12)


@prop(20)
@given(st.data(), st.integers(BLOCK - 2, 2 * BLOCK + 3))
def test_blocks_join_without_a_seam(data: st.DataObject, n: int) -> None:
    """More rows than are scored at once, against one plain masked softmax."""
    valid = data.draw(valid_masks(2, n))
    view = TokenView(torch.zeros(2, n, 1), valid=valid)
    trace = attention_trace(2, n, "normal", torch.float64, Random(data.draw(seeds)))
    probs = dense(trace, view)
    window = data.draw(st.sampled_from((1, BLOCK, BLOCK + 1, n)))
    got = received_attention(trace, valid, view.position, window)
    rank = valid.long().cumsum(-1)
    votes = (valid & (rank > rank[:, -1:] - window)).double()
    want = (votes[:, None, None] @ probs).squeeze(-2) / votes.sum(-1)[:, None, None]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def dense(trace: AttentionTrace, view: TokenView) -> Tensor:
    """All probabilities ``(B, H, N, N)`` in the dtype of the trace; rows that see nothing are zero."""
    n = view.valid.shape[1]
    key = trace.key.repeat_interleave(trace.query.shape[1] // trace.key.shape[1], 1)
    scores = trace.query @ key.transpose(-1, -2) * trace.scaling
    seen = torch.ones(n, n, dtype=torch.bool).tril() & view.valid[:, None, :] & view.valid[:, :, None]
    if trace.window is not None:
        seen &= view.position[:, :, None] - view.position[:, None, :] < trace.window
    return scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1).nan_to_num(0)


def naive_received(trace: AttentionTrace, view: TokenView, window: int, moment: int) -> Tensor:
    rank = view.valid.long().cumsum(-1)
    votes = (view.valid & (rank > rank[:, -1:] - window)).to(trace.query.dtype)
    mean = (votes[:, None, None] @ dense(trace, view) ** moment).squeeze(-2) / votes.sum(-1)[:, None, None]
    return mean ** (1 / moment)


def naive_norm(trace: AttentionTrace, view: TokenView, window: int, moment: int) -> Tensor:
    norm = torch.linalg.vector_norm(trace.value, dim=-1)
    return naive_received(trace, view, window, moment) * norm.repeat_interleave(
        trace.query.shape[1] // norm.shape[1], 1
    )


@pytest.mark.parametrize(
    ("fast", "naive"),
    [
        (lambda t, v, w, m: received_attention(t, v.valid, v.position, w, m), naive_received),
        (lambda t, v, w, m: attention_norm(t, v.valid, v.position, w, m), naive_norm),
    ],
    ids=["received", "norm"],
)
@prop(30)
@given(
    view=probed(dtypes=(torch.bfloat16,), max_tokens=40, kinds=("normal",), garbage=False),
    window=st.integers(1, 45),
    moment=moments,
)
def test_bfloat16_errs_less_than_twice_a_plain_bfloat16_version(
    fast: Callable[..., Tensor], naive: Callable[..., Tensor], view: TokenView, window: int, moment: int
) -> None:
    (trace,) = view.evidence.attention
    truth = naive(as_double(trace), view, window, moment)
    ours = (fast(trace, view, window, moment).double() - truth).abs().max()
    plain = (naive(trace, view, window, moment).double() - truth).abs().max()
    assert ours <= 2 * plain + 1e-5


@prop(30)
@given(probed(dtypes=(torch.float32,), max_tokens=40, kinds=("normal",)), st.integers(1, 45))
def test_float32_stays_near_float64(view: TokenView, window: int) -> None:
    (trace,) = view.evidence.attention
    exact = as_double(trace)
    close = {"rtol": 1e-4, "atol": 1e-5}
    for measure in (received_attention, attention_norm):
        got, want = (measure(t, view.valid, view.position, window) for t in (trace, exact))
        valid = view.valid[:, None].expand_as(got)
        torch.testing.assert_close(got[valid].double(), want[valid], **close)


@prop(30)
@given(probed(max_tokens=20, merged=None), st.integers(0, 4), st.integers(0, 4), seeds, st.integers(1, 12))
def test_padding_and_batch_mates_change_nothing(view: TokenView, left: int, right: int, seed: int, window: int) -> None:
    wider = padded(view, left, right, seed)
    for row in range(len(view.valid)):
        one = alone(view, row)
        for name in ("received", "norm"):
            of_batch, of_wider, of_one = (
                statistic(name, v, window)[r][:, v.valid[r]] for v, r in ((view, row), (wider, row), (one, 0))
            )
            torch.testing.assert_close(of_batch, of_one, rtol=0, atol=1e-12)
            torch.testing.assert_close(of_wider, of_one, rtol=0, atol=1e-12)


def statistic(name: str, view: TokenView, window: int) -> Tensor:
    (trace,) = view.evidence.attention
    measure = received_attention if name == "received" else attention_norm
    return measure(trace, view.valid, view.position, window)


@prop(60)
@given(st.data(), st.integers(1, 12), st.integers(1, 20))
def test_last_rows(data: st.DataObject, n: int, window: int) -> None:
    valid = data.draw(valid_masks(3, n))
    rows, real = last_rows(valid, window)
    assert rows.shape == real.shape == (3, min(window, n))
    assert (rows >= 0).all() and (rows < n).all()
    for row in range(3):
        assert rows[row][real[row]].tolist() == valid[row].nonzero().flatten().tolist()[-window:]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives out, in numbers that its storage holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("name", ["received", "norm"])
def test_no_tensor_is_as_large_as_the_attention_matrix(name: str) -> None:
    n, rng = 4096, generator(0)
    trace = AttentionTrace(*(numbers((1, 1, n, 1), "normal", rng) for _ in range(3)), scaling=1.0)
    view = TokenView(torch.zeros(1, n, 1), evidence=Evidence(attention=(trace,)))
    with Largest() as largest:
        statistic(name, view, n)
    assert BLOCK * n <= largest.numel <= 2 * BLOCK * n < n * n


@pytest.mark.parametrize("kind", ["mean", "max"])
@prop(60)
@given(data=st.data(), n=st.integers(1, 15), width=st.sampled_from((1, 3, 5, 11, 17)), dtype=st.sampled_from(FLOATS))
def test_pool(kind: str, data: st.DataObject, n: int, width: int, dtype: torch.dtype) -> None:
    valid = data.draw(valid_masks(2, n))
    score = torch.rand(2, n, generator=generator(data.draw(seeds)), dtype=torch.float64).to(dtype)
    got = pool(torch.where(valid, score, 1e6), valid, width, kind)
    assert got.dtype == dtype and got.shape == score.shape
    want = torch.zeros(2, n, dtype=torch.float64)
    for row in range(2):
        for i in valid[row].nonzero().flatten().tolist():
            near = [float(score[row, j]) for j in range(n) if abs(i - j) <= width // 2 and bool(valid[row, j])]
            want[row, i] = max(near) if kind == "max" else math.fsum(near) / len(near)
    close = 0.0 if kind == "max" or width == 1 else 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), want, rtol=close, atol=0)


@pytest.mark.parametrize("kind", ["mean", "max"])
def test_pool_of_one_changes_nothing(kind: str) -> None:
    score = torch.tensor([[0.3, 0.1, 0.7]])
    assert torch.equal(pool(score, torch.ones(1, 3, dtype=torch.bool), 1, kind), score)


def test_pool_refuses_an_unknown_kind() -> None:
    with pytest.raises(ValueError, match="kind must be 'mean' or 'max', got 'median'"):
        pool(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool), 3, "median")


def slow_bidirectional(trace: AttentionTrace, rows: Tensor, bias: Tensor | None, moment: int) -> Tensor:
    """Softmax over all keys, a voter at a time."""
    b, h, n, _ = trace.query.shape
    out = torch.zeros(b, h, n, dtype=torch.float64)
    for row in range(b):
        voters = [i for i in rows[row].tolist() if i >= 0]
        for head in range(h):
            group = head // (h // trace.key.shape[1])
            for i in voters:
                dots = [trace.scaling * float(trace.query[row, head, i] @ trace.key[row, group, j]) for j in range(n)]
                if bias is not None:
                    dots = [d + float(bias[row, j]) for j, d in enumerate(dots)]
                total = math.fsum(math.exp(d) for d in dots)
                for j, d in enumerate(dots):
                    out[row, head, j] += (math.exp(d) / total) ** moment / len(voters)
    return out ** (1 / moment)


@prop(30)
@given(prefix_views(dtypes=DOUBLE, max_patches=8), seeds, moments, st.sampled_from(("none", "size", "padding")))
def test_bidirectional_attention(view: TokenView, seed: int, moment: int, kind: str) -> None:
    (trace,) = view.evidence.attention
    b, n = view.position.shape
    rng = generator(seed)
    rows = torch.randint(-1, n, (b, 5), generator=rng)
    rows[:, 0] = torch.randint(n, (b,), generator=rng)
    bias = None if kind == "none" else view.size.double().log()
    junk = trace
    if kind == "padding":
        gone = torch.rand(b, n, generator=rng) < 0.4
        gone.scatter_(1, torch.randint(n, (b, 1), generator=rng), False)
        bias = bias.masked_fill(gone, -torch.inf)
        junk = replace(trace, key=trace.key.masked_fill(gone[:, None, :, None], torch.nan))
    got = bidirectional_attention(junk, rows, bias, moment)
    torch.testing.assert_close(got, slow_bidirectional(trace, rows, bias, moment), rtol=0, atol=1e-10)
    if moment == 1:
        torch.testing.assert_close(got.sum(-1), torch.ones_like(got[..., 0]), rtol=0, atol=1e-10)


@prop(80)
@given(
    st.data(), st.integers(1, 9), moments, st.sampled_from((0.0, 1.0, 1e3, 1e6)), st.sampled_from(FLOATS), st.booleans()
)
def test_statistics_are_finite_whoever_votes_and_whatever_is_hidden(
    data: st.DataObject, n: int, moment: int, scale: float, dtype: torch.dtype, nan: bool
) -> None:
    """Rows without a voter, rows of padding alone, nobody at all: zeros. And a batch mate's voters are its own."""
    valid = data.draw(valid_masks(3, n))
    valid[1] &= data.draw(st.booleans())
    rng = generator(data.draw(seeds))
    whole = attention_trace(3, n, "normal", dtype, Random(data.draw(seeds)))
    gone = ~valid[:, None, :, None]
    # What padding holds is not read, not even where it is not a number.
    q, k, v = ((x * scale).masked_fill(gone, torch.nan if nan else 1e30) for x in (whole.query, whole.key, whole.value))
    trace = replace(whole, query=q, key=k, value=v, window=None)
    position = (valid.long().cumsum(-1) - 1).clamp_min(0)
    there = [row.nonzero().flatten().tolist() for row in valid]
    width = data.draw(st.integers(0, 4))
    rows = torch.full((3, width), -1)
    for row in (0, 1):  # nobody votes in the last row
        for vote in range(width if there[row] else 0):
            rows[row, vote] = there[row][int(torch.randint(len(there[row]), (1,), generator=rng))]
    rows = torch.where(torch.rand(rows.shape, generator=rng) < 0.3, -1, rows)
    bias = torch.zeros(3, n).masked_fill(~valid, -torch.inf)
    for got in (
        attention_from(trace, rows, valid, position, moment),
        bidirectional_attention(trace, rows, bias, moment),
        received_attention(trace, valid, position, 1 + width, moment),
    ):
        assert got.shape == (3, q.shape[1], n) and bool(got.isfinite().all())
        assert bool((got[gone[..., 0].expand_as(got)] == 0).all())
    for got in (attention_from(trace, rows, valid, position), bidirectional_attention(trace, rows, bias)):
        total = (rows >= 0).any(-1).double()[:, None].expand(got.shape[:2])
        torch.testing.assert_close(got.double().sum(-1), total, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_bidirectional_attention_runs_in_float32_at_least_and_in_blocks(dtype: torch.dtype) -> None:
    rng = generator(1)
    trace = AttentionTrace(*(numbers((1, 2, 150, 4), "normal", rng, dtype) for _ in range(3)), scaling=0.5)
    rows = torch.arange(150)[None]
    got = bidirectional_attention(trace, rows)
    assert got.dtype == torch.promote_types(dtype, torch.float32)
    want = bidirectional_attention(as_double(trace), rows)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-8)
    scores = as_double(trace).query @ as_double(trace).key.transpose(-1, -2) * 0.5
    torch.testing.assert_close(want, scores.softmax(-1).mean(-2), rtol=0, atol=1e-12)


def test_bidirectional_attention_never_holds_the_matrix_and_knows_no_window() -> None:
    n, rng = 2048, generator(0)
    trace = AttentionTrace(*(numbers((1, 1, n, 1), "normal", rng) for _ in range(3)), scaling=1.0)
    with Largest() as largest:
        bidirectional_attention(trace, torch.arange(n)[None], torch.zeros(1, n))
    assert largest.numel == 2 * BLOCK * n < n * n
    with pytest.raises(ValueError, match="trace must be of attention in both directions, without a window, got 7"):
        bidirectional_attention(replace(trace, window=7), torch.zeros(1, 1).long())


def test_a_merged_token_is_read_as_often_as_what_it_stands_for() -> None:
    """log(size) on a key is that key over again."""
    rng = generator(2)
    trace = AttentionTrace(*(numbers((1, 2, 6, 4), "normal", rng, torch.float64) for _ in range(3)), scaling=0.5)
    size = torch.tensor([[1, 3, 1, 2, 1, 1]])
    over = torch.arange(6).repeat_interleave(size[0])
    long = replace(trace, query=trace.query[:, :, over], key=trace.key[:, :, over], value=trace.value[:, :, over])
    got = bidirectional_attention(trace, torch.tensor([[0, 4]]), size.double().log())
    want = bidirectional_attention(long, torch.tensor([[0, 7]]))
    torch.testing.assert_close(got, torch.zeros_like(got).index_add_(2, over, want), rtol=0, atol=1e-12)


@prop(60)
@given(views(attention=1, dtypes=(torch.float64,), kinds=("normal", "tied"), max_tokens=14), st.booleans())
def test_attention_entropy_is_that_of_each_row_over_the_largest_possible(view: TokenView, biased: bool) -> None:
    trace = view.evidence.attention[0]
    bias = view.size.clamp_min(1).double().log() if biased else None
    got = attention_entropy(trace, view.valid, view.position, bias)
    heads = trace.query.shape[1]
    for row in range(len(view.valid)):
        tokens = view.valid[row].nonzero().flatten().tolist()
        for head in range(heads):
            group = head // (heads // trace.key.shape[1])
            for i in tokens:
                near = [j for j in tokens if j <= i]
                if trace.window is not None:
                    near = [j for j in near if view.position[row, i] - view.position[row, j] < trace.window]
                dots = [
                    float(trace.query[row, head, i] @ trace.key[row, group, j]) * trace.scaling
                    + (math.log(int(view.size[row, j])) if biased else 0.0)
                    for j in near
                ]
                total = math.fsum(math.exp(d - max(dots)) for d in dots)
                p = [math.exp(d - max(dots)) / total for d in dots]
                want = -math.fsum(x * math.log(x) for x in p if x > 0) / math.log(max(2, len(near)))
                assert float(got[row, head, i]) == pytest.approx(want, abs=1e-9)
    assert (got.transpose(1, 2)[~view.valid] == 0).all()


@prop(20)
@given(views(attention=1, dtypes=(torch.float64,), merged=True, max_tokens=14))
def test_a_bias_counts_as_log_size_in_attention_that_is_received(view: TokenView) -> None:
    """A key of size s receives what s keys like it would receive together."""
    trace, bias = view.evidence.attention[0], view.size.clamp_min(1).double().log()
    got = received_attention(replace(trace, window=None), view.valid, view.position, 5, bias=bias)
    each = torch.repeat_interleave(torch.arange(view.size.shape[1]), view.size[0].clamp_min(1))
    if not bool(view.valid[0].all()):
        return
    key, query = trace.key[:1, :, each], trace.query[:1]
    one = replace(trace, window=None, query=query[:, :, each], key=key, value=trace.value[:1, :, each])
    last = torch.tensor([[int((each <= i).sum()) - 1 for i in range(query.shape[2])][-5:]])
    ones = torch.ones(1, len(each), dtype=torch.bool)
    whole = attention_from(one, last, ones, torch.arange(len(each))[None])
    want = torch.zeros_like(got[:1]).index_add_(2, each, whole)
    torch.testing.assert_close(got[:1], want, atol=1e-9, rtol=1e-7)
