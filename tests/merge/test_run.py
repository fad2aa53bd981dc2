from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from caches import held as held_cache
from hosts_zoo import DEPTH, WINDOW, ZOO, build, generate, pad, reduce, tokens, window_of
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import UnsupportedModelError
from quickmerge.merge.run import RunStats, cache_bytes, cache_bytes_full, layer_runs, observe

SETTINGS: dict[str, Any] = {"layer": 2, "sinks": 2, "recent": 5}


class Slow(qm.Uniform):
    """Takes a known time to decide."""

    def plan(self, view: Any) -> Any:
        time.sleep(0.05)
        return super().plan(view)


def entry_bytes(model: Any, rows: int) -> int:
    """One entry of one layer: a key and a value for each key head, in float32."""
    cache = held_cache(model(tokens(rows, 3)))
    return cache.layers[0].keys[:, :, :1].numel() * 4 * 2


@pytest.mark.parametrize("family", ZOO)
def test_cache_bytes_are_those_of_the_layers(family: str) -> None:
    model = build(family)
    with torch.no_grad():
        one = entry_bytes(model, 2)
        with reduce(model, qm.Uniform(keep=0.5), **SETTINGS) as run:
            generate(model, tokens(2, 40), 4)
    stats = run.summary()

    def held(count: int, layer: int) -> int:
        window = window_of(model.base_model.config, layer)
        return count if window is None else min(count, WINDOW - 1)

    assert stats.prompt_cache_bytes == one * sum(held(n, i) for i, n in enumerate([40, 40, 20, 20]))
    assert stats.prompt_cache_bytes_full == one * sum(held(40, i) for i in range(DEPTH))
    # Four new tokens: the last one is never read.
    assert stats.cache_bytes == one * sum(held(n, i) for i, n in enumerate([43, 43, 23, 23]))
    assert stats.cache_bytes_full == one * sum(held(43, i) for i in range(DEPTH))


def test_the_bytes_of_an_unreduced_cache_are_its_full_bytes() -> None:
    for family, windows in (("llama", (None,) * 4), ("gemma3_text", (WINDOW, None) * 2)):
        model = build(family)
        with torch.no_grad():
            cache = held_cache(model(tokens(1, 30)))
        assert cache_bytes(cache) == cache_bytes_full(cache, 30, windows) > 0
    assert cache_bytes(DynamicCache()) == cache_bytes_full(DynamicCache(), 5, ()) == 0


@pytest.mark.parametrize(
    ("counts", "runs"),
    [
        ([], []),
        ([5.0], [(0, 0, 5.0)]),
        ([5, 5, 2], [(0, 1, 5), (2, 2, 2)]),
        ([1, 2, 1], [(0, 0, 1), (1, 1, 2), (2, 2, 1)]),
    ],
)
def test_layer_runs(counts: list[float], runs: list[tuple[int, int, float]]) -> None:
    assert layer_runs(counts) == runs


def test_counts_of_a_generation() -> None:
    model = build("llama")
    rows = [tokens(1, 40)[0], tokens(1, 31)[0]]
    ids, mask, _ = pad(rows, "left")
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), **SETTINGS) as run:
        generate(model, ids, 6, attention_mask=mask)
    stats = run.summary()
    assert (stats.mode, stats.rows, stats.tokens_in) == ("prefix", 2, 35.5)
    assert stats.reducer == "Uniform(keep=0.5)"
    assert stats.tokens_per_layer == [35.5, 35.5, 18.0, 18.0] and stats.tokens_kept == 18.0
    assert stats.decode_steps == 5
    assert 0 < stats.reducer_seconds < stats.prefill_seconds
    assert stats.decode_seconds > 0
    assert stats.decode_seconds_per_token == pytest.approx(stats.decode_seconds / 5)


def test_seconds_of_the_reducer_lie_inside_the_prefill() -> None:
    model = build("llama")
    with torch.no_grad(), reduce(model, Slow(keep=0.5), **SETTINGS) as run:
        began = time.perf_counter()
        model(tokens(1, 40))
        whole = time.perf_counter() - began
    stats = run.summary()
    assert 0.05 <= stats.reducer_seconds <= stats.prefill_seconds <= whole
    assert stats.decode_steps == 0 and stats.decode_seconds_per_token == 0


def test_a_second_prompt_starts_new_counts() -> None:
    model = build("llama")
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), **SETTINGS) as run:
        generate(model, tokens(2, 40), 6)
        first = run.summary()
        generate(model, tokens(1, 60), 3)
    assert (first.tokens_in, first.decode_steps) == (40, 5)
    second = run.summary()
    assert (second.rows, second.tokens_in, second.decode_steps) == (1, 60, 2)
    assert second.tokens_per_layer == [60, 60, 30, 30]


def test_the_summary_outlives_the_run_and_is_json() -> None:
    model = build("llama")
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), **SETTINGS) as run:
        model(tokens(1, 40))
    read = json.loads(json.dumps(run.summary().as_dict()))
    assert read["tokens_kept"] == 20 and read["decode_seconds_per_token"] == 0
    assert read["tokens_per_layer"] == [40, 40, 20, 20] and read["rows"] == 1


def test_what_prints() -> None:
    stats = RunStats(
        reducer="Uniform(keep=0.5)",
        rows=2,
        tokens_in=40.0,
        tokens_per_layer=[40.0, 40.0, 20.0, 12.5],
        prefill_seconds=1.5,
        reducer_seconds=0.25,
        decode_steps=4,
        decode_seconds=0.5,
        cache_bytes=2**20,
        cache_bytes_full=4 * 2**20,
    )
    assert str(stats).splitlines() == [
        "Uniform(keep=0.5) (prefix), 2 row(s), 40 tokens in",
        "  read:    40 in layers 0-1, 20 in layer 2, 12.5 in layer 3",
        "  prefill: 1.500 s, of which the reducer 0.250 s",
        "  decode:  4 steps, 125.0 ms each",
        "  cache:   1.00 MiB, 25 % of 4.00 MiB",
    ]
    assert stats.tokens_kept == 16.25


def test_before_anything_is_read() -> None:
    run = reduce(build("llama"), qm.Uniform(keep=0.5))
    assert str(run.summary()) == "Uniform(keep=0.5) (prefix): nothing has been read yet"
    assert run.summary().tokens_kept == 0 and run.summary().decode_seconds_per_token == 0


def test_without_a_cache_no_bytes_are_claimed() -> None:
    model = build("llama")
    with torch.no_grad(), reduce(model, qm.Uniform(keep=0.5), **SETTINGS) as run:
        model(tokens(1, 40), use_cache=False)
    assert run.summary().cache_bytes == run.summary().cache_bytes_full == 0
    assert "cache:   0.00 MiB" in str(run.summary())


@pytest.mark.parametrize("family", ZOO)
@pytest.mark.parametrize("padded", [False, True])
def test_observing_changes_nothing_and_counts_the_same(family: str, padded: bool, untouched: Any) -> None:
    model = untouched(build(family))
    ids, mask, _ = pad([tokens(1, 40)[0], tokens(1, 30 if padded else 40)[0]], "left")
    with torch.no_grad():
        plain = generate(model, ids, 4, attention_mask=mask)
        with observe(model) as run:
            assert model.config._attn_implementation == "sdpa"
            seen = generate(model, ids, 4, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(plain.logits, seen.logits, strict=True))
    stats = run.summary()
    length = 35.0 if padded else 40.0
    assert (stats.mode, stats.reducer, stats.rows, stats.tokens_in) == ("none", "none", 2, length)
    assert stats.tokens_per_layer == [length] * DEPTH and stats.tokens_kept == length
    assert stats.decode_steps == 3 and stats.prefill_seconds > 0 and stats.reducer_seconds == 0
    assert stats.cache_bytes == stats.cache_bytes_full == cache_bytes(held_cache(seen)) > 0


def test_what_cannot_be_reduced_cannot_be_observed() -> None:
    with pytest.raises(UnsupportedModelError, match="LlamaModel has no language-model head"):
        observe(build("llama").model)
