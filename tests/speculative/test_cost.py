"""How many nodes are worth reading."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from decoding_samples import Scripted, greedy, prompts, tiny
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop, seeds

from quickmerge.speculative import SpeculativeDecoding, engine
from quickmerge.speculative.cost import PAYS, Cost, best_size, measure
from quickmerge.speculative.target import Target
from quickmerge.speculative.tree import Packed


def test_seconds_are_a_line_between_and_beyond_what_was_measured() -> None:
    cost = Cost((1, 2, 4), (1.0, 1.2, 2.0))
    assert cost.of(np.array([1.0, 1.5, 3.0, 4.0, 6.0, 40.0])) == pytest.approx([1.0, 1.1, 1.6, 2.0, 2.8, 16.4])
    assert Cost((1,), (0.5,)).of(np.array([1.0, 4.0])) == pytest.approx([0.5, 2.0])


@given(rows=st.integers(1, 3), nodes=st.integers(1, 12), draft=st.floats(0, 3), seed=seeds)
@prop(60)
def test_the_size_is_the_best_of_all_sizes(rows: int, nodes: int, draft: float, seed: int) -> None:
    rng = Random(seed)
    probs = [[1.0, *(rng.random() for _ in range(rng.randrange(nodes)))] for _ in range(rows)]
    cost = Cost((1, 4, 9, 16), tuple(0.5 + rng.random() for _ in range(4)))  # they need not rise
    rates = []
    for size in range(1, max(len(row) for row in probs) + 1):
        tokens = sum(sum(sorted(row)[-size:]) for row in probs)
        plain = float(cost.of(np.array([float(size * rows)]))[0])
        padded = min(float(cost.of(np.array([float(wide * rows)]))[0]) for wide in range(size, 40))
        rates.append(tokens / ((padded if padded < PAYS * plain else plain) + draft))
    assert best_size(probs, cost, draft) == int(np.argmax(rates)) + 1


def test_what_costs_nothing_is_read_and_what_gives_nothing_is_not() -> None:
    flat, steep = Cost((1, 64), (1.0, 1.0)), Cost((1, 64), (1.0, 64.0))
    assert best_size([[1.0, 0.3, 0.01]], flat, 0.0) == 3
    assert best_size([[1.0, 0.3, 0.01]], steep, 0.0) == 1
    assert best_size([[1.0, 0.9, 0.1]], steep, 1.0) == 2  # a draft that is paid for anyway
    assert best_size([[1.0]], steep, 0.0) == 1


def test_a_small_pass_is_padded_to_a_larger_one_that_takes_less() -> None:
    dip = Cost((1, 2, 3, 4, 8), (1.0, 2.0, 1.9, 1.4, 2.2))
    assert dip.widths(1, 8).tolist() == [1, 4, 4, 4, 5, 6, 7, 8]
    assert dip.passes(1, 8) == pytest.approx([1.0, 1.4, 1.4, 1.4, 1.6, 1.8, 2.0, 2.2])
    assert dip.widths(2, 4).tolist() == [2, 2, 3, 4]  # two rows of two nodes are four tokens, and so are two of one
    assert dip.widths(3, 2).tolist() == [1, 2]
    nearly = Cost((1, 2, 4), (1.0, 1.1, 1.05))
    assert nearly.widths(1, 4).tolist() == [1, 2, 3, 4]  # no more than noise
    assert best_size([[1.0, 0.3, 0.2, 0.2]], dip, 0.0) == 4  # though two or three alone would not have paid
    assert float(Cost((1, 4), (2.0, 1.0)).of(np.array([100.0]))[0]) == 1.0  # beyond, it does not go on falling


def test_a_curve_that_falls_again_is_taken_as_it_was_measured() -> None:
    """As of float32 on a processor where two rows take 1.63 times as long as one, and four less than three."""
    cost = Cost((1, 2, 3, 4), (1.0, 1.63, 1.9, 1.75))
    assert cost.passes(1, 4).tolist() == [1.0, 1.63, 1.9, 1.75]  # not forced to rise, and padded for a tenth alone
    assert best_size([[1.0, 0.5, 0.4, 0.3]], cost, 0.0) == 4  # neither two nor three would have paid
    assert best_size([[1.0, 0.5, 0.4]], cost, 0.0) == 1
    assert best_size([[1.0, 0.6, 0.5]], cost, 0.0) == 3
    assert Cost((1, 2, 3, 4), (1.0, 1.63, 2.1, 1.75)).widths(1, 4).tolist() == [1, 2, 4, 4]


def test_padding_changes_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = tiny(), prompts([5, 9])
    wanted = greedy(model, inputs, 15)
    read: list[int] = []
    plain = Target.read

    def watch(self: Target, packed: Packed) -> Any:
        read.append(packed.tokens.shape[1])
        return plain(self, packed)

    monkeypatch.setattr(Target, "read", watch)
    monkeypatch.setattr(engine, "measure", lambda model, most: Cost((1, 6, 8, 16), (1.0, 2.0, 0.5, 3.0)))
    found = greedy(model, inputs, 15, custom_generate=SpeculativeDecoding(Scripted(wanted, 0.7), nodes=8))
    assert torch.equal(found, wanted)
    assert read and all(wide * 2 >= 8 for wide in read)


def test_a_model_is_measured_once_for_each_size() -> None:
    model = tiny("qwen2")
    cost = measure(model, 12)
    assert cost.tokens == (1, 2, 3, 4, 8, 12)
    assert measure(model, 12) is cost
    assert all(seconds > 0 for seconds in cost.seconds)
    assert measure(model, 1).tokens == (1,)
    assert measure(model, 200).tokens == (1, 2, 3, 4, 8, 16, 32, 64)


def test_a_short_context_is_room_enough() -> None:
    model = tiny("qwen2", max_position_embeddings=6)
    assert measure(model, 32).tokens == (1, 2, 3, 4)
    assert measure(tiny("qwen2", max_position_embeddings=1), 32).tokens == (1,)
