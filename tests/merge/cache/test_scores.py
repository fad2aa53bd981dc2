"""Scores against the papers' formulas, written as loops over single rows, heads and entries in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hosts_zoo import build
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

import quickmerge as qm
from quickmerge.merge.cache.view import CacheView
from quickmerge.models.decoder import find_decoder
from quickmerge.models.rotary import Rotary

HEADS, GROUPS, WIDTH = 4, 2, 8


def view(seed: int, n: int, *, side: str = "left", window: int | None = None, biased: bool = False) -> CacheView:
    """Two rows, the second of them shorter; padding holds what must not matter."""
    draw = generator(seed)
    query, key, value = (
        torch.randn(2, h, n, WIDTH, generator=draw, dtype=torch.float64) for h in (HEADS, GROUPS, GROUPS)
    )
    short = max(1, n - 1 - seed % 5)
    valid = torch.ones(2, n, dtype=torch.bool)
    if side == "left":
        valid[1, : n - short] = False
    else:
        valid[1, short:] = False
    for x in (query, key, value):
        x.transpose(1, 2)[~valid] = 1e30
    bias = torch.rand(2, n, generator=draw, dtype=torch.float64) * 2 if biased else None
    position = (valid.long().cumsum(-1) - 1).clamp_min(0)
    base = find_decoder(build("llama")).base
    rotary = Rotary.of(base, base.layers[0].self_attn, 0, wanted="")
    group = (torch.rand(2, n, generator=draw) < 0.3).long().cumsum(-1)
    return CacheView(query, key, value, valid, position, WIDTH**-0.5, window, bias, lambda: rotary, group)


def attention(v: CacheView, row: int, head: int, i: int) -> dict[int, float]:
    """The probabilities of one query over the entries that it sees."""
    g = head * GROUPS // HEADS
    seen = {}
    for j in range(i + 1):
        near = v.window is None or int(v.position[row, i] - v.position[row, j]) < v.window
        if v.valid[row, i] and v.valid[row, j] and near:
            added = 0.0 if v.bias is None else float(v.bias[row, j])
            seen[j] = float(v.query[row, head, i] @ v.key[row, g, j]) * v.scaling + added
    most = max(seen.values(), default=0.0)
    total = sum(math.exp(s - most) for s in seen.values())
    return {j: math.exp(s - most) / total for j, s in seen.items()}


def entries(v: CacheView, row: int) -> list[int]:
    return v.valid[row].nonzero().flatten().tolist()


def heads_of(g: int) -> list[int]:
    return [h for h in range(HEADS) if h * GROUPS // HEADS == g]


def observed(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    total, seen = dict.fromkeys(entries(v, row), 0.0), dict.fromkeys(entries(v, row), 0)
    for i in entries(v, row)[:: -method.every]:
        for h in heads_of(g):
            for j, p in attention(v, row, h, i).items():
                total[j] += p / len(heads_of(g))
                seen[j] += h == heads_of(g)[0]
    return {j: t / max(1, seen[j]) if method.average == "mean" else t for j, t in total.items()}


def pooled(score: dict[int, float], width: int, kind: str) -> dict[int, float]:
    out = {}
    for j in score:
        near = [score[i] for i in score if abs(i - j) <= width // 2]
        out[j] = max(near) if kind == "max" else sum(near) / len(near)
    return out


def snapkv(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    there = entries(v, row)
    score = dict.fromkeys(there, 0.0)
    voters = there[-method.window :]
    for i in voters:
        for h in heads_of(g):
            for j, p in attention(v, row, h, i).items():
                score[j] += p / len(voters) / len(heads_of(g))
    outside = {j: s for j, s in score.items() if j not in voters}
    return {**dict.fromkeys(there, 0.0), **pooled(outside, method.kernel, method.pooling)}


def norm(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    there = entries(v, row)
    voters, reach = there[-method.window :], len(there) if v.window is None else min(len(there), v.window)
    nearest = min(method.nearest, reach // 8)
    score = dict.fromkeys(there, 0.0)
    for h in heads_of(g):
        square = dict.fromkeys(there, 0.0)
        for i in voters:
            for j, p in attention(v, row, h, i).items():
                if int(v.position[row, i] - v.position[row, j]) >= nearest:
                    square[j] += (p * float(v.value[row, g, j].norm())) ** 2
        for j in there:
            score[j] += math.sqrt(square[j] / len(voters)) / len(heads_of(g))
    found = pooled(score, method.kernel, "mean")
    if v.group is None or method.spans == "none":
        return found
    spans: dict[int, float] = {}
    for j, each in found.items():
        spans[int(v.group[row, j])] = max(spans.get(int(v.group[row, j]), 0.0), each)
    return {j: spans[int(v.group[row, j])] for j in found}


def expected(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    there = entries(v, row)
    told = there[method.sinks :] or there
    assert v.rotary is not None
    rotary = v.rotary()

    def turned(x: Tensor, position: int, sign: int) -> Tensor:
        """By the angles of one position, pairs of channels j and j + d/2."""
        assert rotary.module is not None
        cos, sin = (a[0, 0].double() for a in rotary.module(torch.zeros(1), torch.tensor([[position]])))
        one, two = x[: WIDTH // 2], x[WIDTH // 2 :]
        cos, sin = cos[: WIDTH // 2], sign * sin[: WIDTH // 2]
        return torch.cat([one * cos - two * sin, two * cos + one * sin])

    turn = torch.zeros(WIDTH, WIDTH, dtype=torch.float64)
    for step in range(1, method.future + 1):
        turn += torch.stack([turned(e, len(there) - 1 + step, 1) for e in torch.eye(WIDTH).double()], 1) / method.future
    score = dict.fromkeys(there, 0.0)
    for h in heads_of(g):
        bare = torch.stack([turned(v.query[row, h, i], int(v.position[row, i]), -1) for i in told])
        mean = turn @ bare.mean(0)
        spread = turn @ torch.cov(bare.T, correction=0) @ turn.T if method.covariance else 0 * turn
        logit = {}
        for j in there:
            k = v.key[row, g, j]
            logit[j] = float(mean @ k) * v.scaling + float(k @ spread @ k) * v.scaling**2 / 2
            logit[j] += 0.0 if v.bias is None else float(v.bias[row, j])
        most = max(logit.values())
        total = sum(math.exp(s - most) for s in logit.values())
        for j in there:
            weight = math.exp(logit[j] - most) / total + method.epsilon
            score[j] += weight * float(v.value[row, g, j].norm()) / len(heads_of(g))
    return score


def keydiff(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    there = entries(v, row)
    unit = {j: v.key[row, g, j] / v.key[row, g, j].norm() for j in there}
    anchor = sum(unit.values()) / len(there)  # type: ignore[arg-type]
    return {j: -float(u @ anchor / anchor.norm()) for j, u in unit.items()}  # type: ignore[union-attr,operator]


def lagkv(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    there = entries(v, row)
    body, lag = there[method.sinks :], method.lag
    parts = [body[a : a + lag] for a in range(0, len(body) - lag + 1, lag)]
    if len(parts) < 2:
        return {j: float(k) for k, j in enumerate(there)}
    out = dict.fromkeys(there, 1.0) | dict.fromkeys(there[: method.sinks], 0.0)
    for part, after in pairwise(parts):
        both = [0.0] * lag
        for x in (v.key, v.value):
            low = torch.stack([x[row, g, j] for j in after]).amin(0)
            high = torch.stack([x[row, g, j] for j in after]).amax(0)
            moves = high > low
            spread = torch.stack([torch.where(moves, (x[row, g, j] - low) / (high - low), 0.0).std() for j in part])
            both = [a + float(b) for a, b in zip(both, spread.softmax(0), strict=True)]
        order = sorted(range(lag), key=lambda k: both[k])
        for rank, k in enumerate(order):
            out[part[k]] = rank / lag
    return out


def streaming(v: CacheView, row: int, g: int, method: Any) -> dict[int, float]:
    return {j: float(k + 1) for k, j in enumerate(entries(v, row))}


METHODS: list[tuple[Any, Callable[..., dict[int, float]]]] = [
    (qm.ObservedAttention(), observed),
    (qm.ObservedAttention(average="sum", every=3), observed),
    (qm.SnapKV(window=5, kernel=3), snapkv),
    (qm.SnapKV(window=64, kernel=3, pooling="max"), snapkv),
    (qm.AttentionNorm(window=6, kernel=5), norm),
    (qm.AttentionNorm(window=6, kernel=3, spans="none"), norm),
    (qm.ExpectedAttention(future=5), expected),
    (qm.ExpectedAttention(future=3, covariance=False, epsilon=0.0, sinks=0), expected),
    (qm.LagKV(lag=4), lagkv),
    (qm.KeyDiff(), keydiff),
    (qm.StreamingLLM(), streaming),
]


@pytest.mark.parametrize(("method", "truth"), METHODS, ids=lambda x: getattr(x, "label", ""))
@given(seed=seeds, n=st.integers(1, 23), side=st.sampled_from(["left", "right"]), biased=st.booleans())
@prop(6)
def test_scores_are_those_of_the_formula(method: Any, truth: Any, seed: int, n: int, side: str, biased: bool) -> None:
    wide = truth in (observed, snapkv, norm)
    v = view(seed, n, side=side, biased=biased, window=7 if wide and seed % 2 else None)
    found = method.scores(v)
    assert found.shape == (2, GROUPS, n)
    for row in range(2):
        for g in range(GROUPS):
            for j, score in truth(v, row, g, method).items():
                assert float(found[row, g, j]) == pytest.approx(score, rel=1e-5, abs=1e-7)


def test_kvzip_takes_the_largest_attention_of_a_second_reading() -> None:
    v = view(3, 20)
    q = 8
    behind = CacheView(v.query[:, :, 12:], v.key, v.value, torch.ones_like(v.valid), v.position, v.scaling)
    whole = CacheView(v.query, v.key, v.value, torch.ones_like(v.valid), v.position, v.scaling)
    found = qm.KVzip().scores(behind)
    assert found.shape == (2, GROUPS, 12)
    for g in range(GROUPS):
        for j in range(12):
            most = max(attention(whole, 0, h, i)[j] for h in heads_of(g) for i in range(20 - q, 20))
            assert float(found[0, g, j]) == pytest.approx(most, rel=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", [each for each, _ in METHODS], ids=lambda x: x.label)
def test_a_row_is_scored_alone(method: Any, side: str) -> None:
    """Neither the other row nor what padding holds matters."""
    v = view(11, 40, side=side)
    there = v.valid[1]
    alone = CacheView(
        v.query[1:, :, there], v.key[1:, :, there], v.value[1:, :, there], v.valid[1:, there], v.position[1:, there],
        v.scaling, v.window, v.bias, v.rotary, None if v.group is None else v.group[1:, there],
    )  # fmt: skip
    torch.testing.assert_close(method.scores(v)[1:, :, there], method.scores(alone), rtol=1e-9, atol=1e-12)
    assert bool(method.scores(v)[v.valid[:, None].expand(-1, GROUPS, -1)].isfinite().all())


def test_values_that_never_change_say_nothing_of_an_entry() -> None:
    """Where one token is repeated, its values in the lowest layer are all the same."""
    v = view(5, 20)
    v.value[:, :, 8:] = v.value[:, :, 8:9]
    scores = qm.LagKV(lag=4, sinks=0).scores(v)
    for g in range(GROUPS):
        for j, score in lagkv(v, 0, g, qm.LagKV(lag=4, sinks=0)).items():
            assert float(scores[0, g, j]) == pytest.approx(score)
