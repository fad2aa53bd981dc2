"""A cache of block-causal mode holds all that is needed to read on: in a copy, in another run, in another thread."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import DEPTH, build, generate, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.errors import QuickmergeError

REDUCERS: dict[str, Any] = {
    "quickmerge": qm.QuickMerge(keep=0.5, window=4, pool=3),
    "tome": qm.ToMe(keep=0.5),
    "entropy": qm.QuickMerge(keep=qm.Entropy(scale=0.7), window=8, pool=1),
}
MODEL = build("llama", dtype=torch.float64)


def attach(reducer: Any, model: Any = MODEL, **more: Any) -> Any:
    return qm.reduce(model, reducer, **{"mode": "block_causal", "chunk": 7, "window": 3, "sinks": 2, **more})


def read_on(cache: Any, ids: Tensor) -> Tensor:
    logits: Tensor = MODEL(ids, **past(cache)).logits
    return logits


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(REDUCERS)),
    cuts=st.lists(st.integers(1, 25), min_size=2, max_size=5),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_a_text_is_read_alike_in_one_run_and_in_one_for_each_turn(name: str, cuts: list[int], seed: int) -> None:
    ids = tokens(2, sum(cuts), seed)
    with attach(REDUCERS[name]):
        whole = MODEL(ids).logits
    cache, parts = DynamicCache(config=MODEL.config), []
    for turn in ids.split(cuts, 1):
        with attach(copy.copy(REDUCERS[name])):
            parts.append(read_on(cache, turn))
    close(torch.cat(parts, 1), whole)


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(sorted(REDUCERS)), first=st.integers(1, 40), more=st.integers(1, 30), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_copies_of_a_cache_go_their_own_ways(name: str, first: int, more: int, seed: int) -> None:
    ids, one, two = tokens(2, first, seed), tokens(2, more, seed + 1), tokens(2, more, seed + 2)
    with attach(REDUCERS[name]):
        cache = held(MODEL(ids))
        twin = copy.deepcopy(cache)
        first_way, second_way = read_on(cache, one), read_on(twin, two)
        third_way = read_on(copy.deepcopy(held(MODEL(ids))), one)
        close(first_way, MODEL(torch.cat([ids, one], 1)).logits[:, first:])
        close(second_way, MODEL(torch.cat([ids, two], 1)).logits[:, first:])
        close(third_way, first_way)
    assert all(layer.rules is other.rules for layer, other in zip(cache.layers, twin.layers, strict=True))


# What is refused ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_cache_is_not_read_outside_of_block_causal_mode() -> None:
    ids, more = tokens(1, 30), tokens(1, 1, 1)
    with attach(REDUCERS["tome"]):
        cache = held(MODEL(ids))
    lengths = [layer.keys.shape for layer in cache.layers]
    for where in (None, qm.reduce(MODEL, qm.Uniform(keep=0.5)), qm.multipole(MODEL)):
        with pytest.raises(QuickmergeError), where or torch.no_grad():
            MODEL(more, **past(cache))
    with pytest.raises(QuickmergeError, match="go on with it in such a block of the same settings"):
        MODEL(more, **past(cache))
    with pytest.raises(QuickmergeError, match="go on with it in such a block"):
        generate(MODEL, torch.cat([ids, more], 1), 2, **past(cache))
    assert [layer.keys.shape for layer in cache.layers] == lengths
    with attach(REDUCERS["tome"]):
        close(read_on(cache, more), MODEL(torch.cat([ids, more], 1)).logits[:, 30:])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"chunk": 16}, r"\(chunk=16 and not 7\)"),
        ({"window": 4, "sinks": 0}, r"\(sinks=0 and not 2, window=4 and not 3\)"),
        ({"layer": 2}, "merged from block 0 on, and layer=2 was asked for"),
        ({"reducer": qm.ToMe(keep=0.25)}, r"reducer=ToMe\(keep=0.25.*\) and not ToMe\(keep=0.5"),
        ({"reducer": qm.Uniform(keep=0.5)}, "reducer=Uniform"),
    ],
)
@torch.no_grad()
def test_a_cache_of_other_settings_is_not_read_on(other: dict[str, Any], message: str) -> None:
    with attach(REDUCERS["tome"]):
        cache = held(MODEL(tokens(1, 30)))
    with attach(other.pop("reducer", REDUCERS["tome"]), **other), pytest.raises(QuickmergeError, match=message):
        MODEL(tokens(1, 1), **past(cache))


@torch.no_grad()
def test_a_layer_below_the_merge_is_no_matter() -> None:
    with attach(REDUCERS["tome"], layer=2):
        cache = held(MODEL(tokens(1, 30)))
    with attach(REDUCERS["tome"]), pytest.raises(QuickmergeError, match="from block 2 on, and layer=0"):
        MODEL(tokens(1, 1), **past(cache))
    with attach(REDUCERS["tome"], layer=2):
        close(read_on(cache, tokens(1, 1)), MODEL(torch.cat([tokens(1, 30), tokens(1, 1)], 1)).logits[:, 30:])


@torch.no_grad()
def test_attention_weights_are_refused() -> None:
    model = build("llama", "eager")
    ids = tokens(1, 30)
    with attach(REDUCERS["tome"], model), pytest.raises(QuickmergeError, match="output_attentions must be False"):
        model(ids, output_attentions=True)
    model.config.output_attentions = True
    with attach(REDUCERS["tome"], model):
        with pytest.raises(QuickmergeError, match="output_attentions must be False in block_causal mode"):
            model(ids)
        assert model(ids, output_attentions=False).logits.shape[1] == 30


# Threads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REDUCERS)
@torch.no_grad()
def test_threads_share_a_run_with_a_cache_each(name: str) -> None:
    texts = [tokens(1 + i % 2, 30 + 9 * i, i) for i in range(4)]

    def work(i: int) -> list[Tensor]:
        cache, parts = DynamicCache(config=MODEL.config), []
        for part in texts[i].split([13, 1, 5, texts[i].shape[1] - 19], 1):
            with torch.no_grad():
                parts.append(read_on(cache, part))
        return parts

    found: dict[int, list[list[Tensor]]] = {i: [] for i in range(4)}
    failed: list[BaseException] = []
    start = threading.Barrier(4)

    def loop(i: int) -> None:
        try:
            start.wait()
            for _ in range(4):
                found[i].append(work(i))
                run.summary()
        except BaseException as error:
            failed.append(error)

    with attach(REDUCERS[name]) as run:
        wanted = [work(i) for i in range(4)]
        threads = [threading.Thread(target=loop, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed, failed
    for i, rounds in found.items():
        assert len(rounds) == 4
        for parts in rounds:
            assert all(torch.equal(a, b) for a, b in zip(parts, wanted[i], strict=True)), i
    assert len(run.summary().tokens_per_layer) == DEPTH


# What a chunk keeps ------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    recency=st.sampled_from([0.0, 0.5, 0.85, 1.0]),
    keep=st.sampled_from([0.2, 0.42, 0.8]),
    window=st.integers(1, 40),
    chunk=st.integers(6, 20),
)
@torch.no_grad()
def test_no_token_of_a_chunk_is_kept_for_being_recent(recency: float, keep: float, window: int, chunk: int) -> None:
    ids = tokens(2, 3 * chunk + window)
    kept = []
    for share in (recency, 0.0):
        with attach(qm.QuickMerge(keep=keep, window=1, pool=1, nearest=0, recency=share), chunk=chunk, window=window):
            layer = held(MODEL(ids)).layers[0]
        kept.append((layer.keys, layer.slots))
    assert kept[0][1] == kept[1][1] and torch.equal(kept[0][0], kept[1][0])
