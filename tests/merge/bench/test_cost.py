"""Counting FLOPs and bytes: against counters that know nothing of our formula."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from caches import past
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.cost import Shape, break_even, model_shape, plan_cost
from quickmerge.merge.reducers import QuickMerge, Random
from quickmerge.merge.run import cache_bytes
from quickmerge.merge.tokens import Count, Entropy, Schedule


def test_flops_equal_torch_s_own_counter(tiny_llama) -> None:
    tiny_llama.set_attn_implementation("eager")  # plain matrix products, which the counter sees
    ids = torch.randint(0, 64, (1, 96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tiny_llama.model(ids)
    shape = model_shape(tiny_llama)
    # The counter knows no causal skipping: it counts 4 n^2 H d where half of that is needed.
    attention = 4 * 96**2 * shape.heads * shape.head_dim * len(shape.weights)
    assert counter.get_total_flops() == pytest.approx(shape.prefill_flops([96.0, 96.0]) + attention / 2, rel=1e-9)


def test_cache_bytes_equal_a_real_cache(tiny_llama) -> None:
    cache = DynamicCache(config=tiny_llama.config)
    with torch.no_grad(), reduce(tiny_llama, Random(keep=0.5), 1, min_tokens=0) as run:
        tiny_llama(torch.randint(0, 64, (1, 60)), **past(cache), use_cache=True)
    shape, stats = model_shape(tiny_llama), run.summary()
    cost = plan_cost(shape, Random(keep=0.5), Schedule((1,)), 60)
    assert cost.cache_bytes == cache_bytes(cache) == stats.prompt_cache_bytes
    assert cost.cache_bytes_full == stats.prompt_cache_bytes_full
    assert list(cost.tokens_per_layer) == stats.tokens_per_layer == [60.0, 30.0]


def test_a_count_can_be_planned_and_an_entropy_budget_can_not(tiny_llama) -> None:
    shape = model_shape(tiny_llama)
    assert plan_cost(shape, Random(keep=Count(33)), Schedule((1,)), 100).tokens_per_layer == (100.0, 33.0)
    with pytest.raises(ValueError, match="keep must be a share or a count"):
        plan_cost(shape, QuickMerge(keep=Entropy()), Schedule((1,)), 100)


def test_several_merges_can_be_planned(tiny_llama) -> None:
    shape = replace(model_shape(tiny_llama), weights=(1,) * 4, windows=(None,) * 4)
    assert plan_cost(shape, Random(keep=0.5), Schedule((1, 3), 0.5), 100).tokens_per_layer == (100.0, 60.0, 60.0, 30.0)
    by_count = plan_cost(shape, Random(keep=Count(50)), Schedule((1, 3), 0.45), 100)
    assert by_count.tokens_per_layer == (100.0, 50.0, 50.0, 23.0)


def test_the_reducer_s_own_operations() -> None:
    """Scores of its voters against all tokens in each probed block, and one weighted sum, at every merge."""
    shape = Shape((0,) * 4, 8, 2, 1, 4, windows=(None,) * 4)
    reducer = QuickMerge(layers=2, window=10)
    first, second = (2 * (2 * 10 * n * 2 * 4) + 2 * n * 8 for n in (100, 40))
    assert shape.reducer_flops(reducer, [100, 40, 40, 5]) == first + second
    assert shape.reducer_flops(reducer, [100, 6, 6, 5]) == first + 2 * (2 * 6 * 6 * 2 * 4) + 2 * 6 * 8
    assert shape.reducer_flops(reducer, [100] * 4) == 0
    assert shape.reducer_flops(Random(), [100, 40, 40, 40]) == 2 * 100 * 8


def test_break_even_is_the_first_length_that_saves(tiny_llama) -> None:
    shape, schedule = model_shape(tiny_llama), Schedule((1,))
    reducer = QuickMerge(keep=0.5)
    even = break_even(shape, reducer, schedule)
    assert even is not None
    assert plan_cost(shape, reducer, schedule, even).flops_ratio < 1
    assert plan_cost(shape, reducer, schedule, even - 1).flops_ratio >= 1
    assert break_even(shape, QuickMerge(keep=1.0), schedule) is None


def test_a_sliding_window_caps_attention_and_cache() -> None:
    shape = Shape((0,), 8, 2, 1, 4, windows=(10,))
    full = Shape((0,), 8, 2, 1, 4, windows=(None,))
    assert shape.prefill_flops([8.0]) == full.prefill_flops([8.0])
    pairs = sum(min(i + 1, 10) for i in range(200))
    assert shape.prefill_flops([200.0]) == pytest.approx(4 * pairs * 2 * 4, rel=0.01)
    assert shape.cache_bytes([200.0]) == 9 * 2 * 1 * 4 * 4
