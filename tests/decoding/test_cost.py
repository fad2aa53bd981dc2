"""How many nodes are worth reading."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from decoding_samples import tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.decoding.cost import Cost, best_size, measure


def test_seconds_are_a_line_between_and_beyond_what_was_measured() -> None:
    cost = Cost((1, 2, 4), (1.0, 1.2, 2.0))
    assert cost.of(np.array([1.0, 1.5, 3.0, 4.0, 6.0, 40.0])) == pytest.approx([1.0, 1.1, 1.6, 2.0, 2.8, 16.4])
    assert Cost((1,), (0.5,)).of(np.array([1.0, 4.0])) == pytest.approx([0.5, 2.0])


@given(rows=st.integers(1, 3), nodes=st.integers(1, 12), draft=st.floats(0, 3), seed=seeds)
@prop(60)
def test_the_size_is_the_best_of_all_sizes(rows: int, nodes: int, draft: float, seed: int) -> None:
    rng = Random(seed)
    probs = [[1.0, *(rng.random() for _ in range(rng.randrange(nodes)))] for _ in range(rows)]
    seconds = sorted(0.5 + rng.random() for _ in range(4))
    cost = Cost((1, 4, 9, 16), tuple(seconds))
    rates = []
    for size in range(1, max(len(row) for row in probs) + 1):
        tokens = sum(sum(sorted(row)[-size:]) for row in probs)
        rates.append(tokens / (float(cost.of(np.array([float(size * rows)]))[0]) + draft))
    assert best_size(probs, cost, draft) == int(np.argmax(rates)) + 1


def test_what_costs_nothing_is_read_and_what_gives_nothing_is_not() -> None:
    flat, steep = Cost((1, 64), (1.0, 1.0)), Cost((1, 64), (1.0, 64.0))
    assert best_size([[1.0, 0.3, 0.01]], flat, 0.0) == 3
    assert best_size([[1.0, 0.3, 0.01]], steep, 0.0) == 1
    assert best_size([[1.0, 0.9, 0.1]], steep, 1.0) == 2  # a draft that is paid for anyway
    assert best_size([[1.0]], steep, 0.0) == 1


def test_a_model_is_measured_once_for_each_size() -> None:
    model = tiny("qwen2")
    cost = measure(model, 12)
    assert cost.tokens == (1, 2, 4, 8, 12)
    assert measure(model, 12) is cost
    assert all(0 < a <= b for a, b in zip(cost.seconds, cost.seconds[1:], strict=False))
    assert measure(model, 1).tokens == (1,)
    assert measure(model, 200).tokens == (1, 2, 4, 8, 16, 32, 64)


def test_a_short_context_is_room_enough() -> None:
    model = tiny("qwen2", max_position_embeddings=6)
    assert measure(model, 32).tokens == (1, 2, 4)
    assert measure(tiny("qwen2", max_position_embeddings=1), 32).tokens == (1,)
