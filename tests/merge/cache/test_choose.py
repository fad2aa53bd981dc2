"""How many entries stay, and which: laws of the counts by layer and head, and of the choice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

import quickmerge as qm
from quickmerge.merge.cache import EVICTORS, as_evictor, make_evictor
from quickmerge.merge.cache.evictor import choose, head_counts, layer_counts


@given(
    held=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=12),
    keep=st.floats(0.01, 1.0),
)
@prop(60)
def test_layers_share_one_limit(held: list[tuple[int, int]], keep: float) -> None:
    there, full = [a for a, _ in held], [a + more for a, more in held]
    counts = layer_counts(keep, there, full)
    assert all(1 <= count <= most for count, most in zip(counts, there, strict=True))
    wanted = min(sum(there), round(keep * sum(full) + 1e-9))
    assert abs(sum(counts) - max(wanted, 0)) <= max(1, len(held) if wanted < len(held) else 1)
    # Whoever gives something away has no fewer than one that keeps all, but for what can't be divided.
    limit = max(counts)
    assert all(count >= limit - 1 or count == most for count, most in zip(counts, there, strict=True))


def test_a_cache_that_is_small_enough_keeps_all() -> None:
    assert layer_counts(0.5, [100, 20, 10], [100, 100, 100]) == [100, 20, 10]
    assert layer_counts(1.0, [7, 7], [7, 7]) == [7, 7]
    assert layer_counts(0.3, [100, 100, 100, 20], [100] * 4) == [33, 33, 34, 20]


@given(seed=seeds, g=st.integers(1, 5), n=st.integers(2, 40), floor=st.sampled_from([0.0, 0.2, 0.5, 1.0]))
@prop(40)
def test_heads_share_what_a_layer_keeps(seed: int, g: int, n: int, floor: float) -> None:
    scores = torch.randn(3, g, n, generator=generator(seed), dtype=torch.float64)
    open_ = torch.ones(3, g, n, dtype=torch.bool)
    count = torch.randint(1, n + 1, (3,), generator=generator(seed + 1))
    found = head_counts(scores, open_, count, floor)
    assert bool((found <= n).all())
    for row in range(3):
        best = sorted(((float(scores[row, h, j]), -h, -j, h) for h in range(g) for j in range(n)), reverse=True)
        star = [sum(h == best_h for *_, best_h in best[: g * int(count[row])]) for h in range(g)]
        exact = [(1 - floor) * s + floor * int(count[row]) for s in star]
        assert all(abs(a - b) < 1 + 1e-9 for a, b in zip(found[row].tolist(), exact, strict=True))
        assert int(found[row].sum()) == g * int(count[row])


@given(
    seed=seeds, n=st.integers(1, 60), share=st.floats(0.05, 1.0), recency=st.sampled_from([0.0, 0.5, 0.7, 1.0]),
    sinks=st.integers(0, 5), heads=st.sampled_from(["equal", "adaptive"]), side=st.sampled_from(["left", "right"]),
)  # fmt: skip
@prop(60)
def test_what_stays(seed: int, n: int, share: float, recency: float, sinks: int, heads: str, side: str) -> None:
    method = qm.KeyDiff(sinks=sinks, recency=recency, heads=heads)
    short = max(1, n - seed % 7)
    valid = torch.ones(2, n, dtype=torch.bool)
    valid[1, slice(0, n - short) if side == "left" else slice(short, n)] = False
    scores = torch.randn(2, 3, n, generator=generator(seed))
    count = (valid.sum(-1) * share).long().clamp_min(1)
    recent = 1 + seed % 3
    kept = choose(method, scores, valid, count, recent)
    for row in range(2):
        there = valid[row].nonzero().flatten().tolist()
        wanted = int(count[row])
        fixed = set(there[:sinks]) | set(there[-recent:])
        room = wanted - len(fixed)
        most = int(wanted * recency + 1e-9)
        newest = [j for j in reversed(there[len(there) - most :] if most else []) if j not in fixed]
        fixed |= set(newest[: max(0, room)])
        left = max(0, wanted - len(fixed))
        for g in range(3):
            chosen = set(kept[row, g].nonzero().flatten().tolist())
            assert chosen <= set(there)
            if wanted >= len(there):
                assert chosen == set(there)
                continue
            assert fixed <= chosen
            rest = sorted((j for j in there if j not in fixed), key=lambda j: (-float(scores[row, g, j]), j))
            assert chosen - fixed == set(rest[: len(chosen) - len(fixed)])
            if heads == "equal":
                assert len(chosen) == max(wanted, len(fixed)) or len(chosen) == len(fixed) + left
        if heads == "adaptive" and wanted < len(there):
            assert int(kept[row].sum()) == 3 * (len(fixed) + min(left, len(there) - len(fixed)))


# Settings and names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVICTORS)
def test_a_method_is_known_by_its_name_and_by_its_label(name: str) -> None:
    method = make_evictor(f"{name}:keep=0.3:sinks=2:heads=adaptive")
    assert (method.keep, method.sinks, method.heads) == (0.3, 2, "adaptive")
    assert make_evictor(method.label, keep=0.3) == method
    assert getattr(qm, type(method).__name__) is type(method)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qm.SnapKV(keep=0), r"keep must be a number in \(0, 1\], got 0"),
        (lambda: qm.SnapKV(keep=float("nan")), r"keep must be a number in \(0, 1\], got nan"),
        (lambda: qm.SnapKV(kernel=4), "kernel must be odd, got 4"),
        (lambda: qm.SnapKV(pooling="median"), "pooling must be one of mean, max, got 'median'"),
        (lambda: qm.KeyDiff(recency=1.5), r"recency must be a number in \[0, 1\], got 1.5"),
        (lambda: qm.KeyDiff(heads="adaptve"), "heads must be one of equal, adaptive, got 'adaptve'.*adaptive"),
        (lambda: qm.KeyDiff(sinks=-1), "sinks must be"),
        (lambda: qm.LagKV(lag=1), "lag must be"),
        (lambda: qm.ObservedAttention(average="max"), "average must be one of mean, sum, got 'max'"),
        (lambda: qm.ExpectedAttention(epsilon=-1), "epsilon must be a number of at least 0, got -1"),
        (lambda: qm.ExpectedAttention(covariance=1), "covariance must be True or False, got 1"),
        (lambda: make_evictor("snapkw"), "cache must be one of .*, got 'snapkw'.*snapkv"),
        (lambda: make_evictor("snapkv:kernl=3"), "snapkv takes settings as name=value .*'kernl=3'.*kernel"),
        (lambda: make_evictor("snapkv", window=3, width=2), "width is no setting of snapkv"),
        (lambda: as_evictor([0.3]), "cache must be a method such as"),
        (lambda: as_evictor(True), "cache must be a method such as"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_share_is_that_of_the_attention_norm() -> None:
    assert as_evictor(0.3) == qm.AttentionNorm(keep=0.3)
    assert as_evictor("lagkv:keep=0.2") == qm.LagKV(keep=0.2)
    assert as_evictor(None) is None
