import random

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop

from quickmerge.training.metrics import Stream, seed_generators, stable_hash

sizes = st.integers(1, 40)
small = st.integers(1, 5)


@given(sizes, st.integers(0, 9), st.integers(0, 5))
@prop(100)
def test_every_epoch_is_a_permutation(items: int, seed: int, epoch: int) -> None:
    taken = Stream(items, seed).take(epoch * items, (epoch + 1) * items)
    assert sorted(taken) == list(range(items))


@given(sizes, small, small, small, st.integers(0, 12))
@prop(100)
def test_the_processes_of_a_step_read_what_one_would(
    items: int, batch: int, accumulate: int, processes: int, step: int
) -> None:
    stream = Stream(items, 3)
    ranks = [
        stream.micro_steps(step, batch=batch, accumulate=accumulate, processes=processes, rank=rank)
        for rank in range(processes)
    ]
    assert all(len(parts) == accumulate and all(len(part) == batch for part in parts) for parts in ranks)
    together = [index for parts in ranks for part in parts for index in part]
    (alone,) = Stream(items, 3).micro_steps(step, batch=batch * accumulate * processes, accumulate=1)
    assert together == alone
    size = batch * accumulate * processes
    assert together == Stream(items, 3).take(step * size, (step + 1) * size)


def test_epochs_and_seeds_differ() -> None:
    orders = [Stream(100, seed).take(epoch * 100, epoch * 100 + 100) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_hash_is_the_same_everywhere() -> None:
    assert stable_hash("micro-step", 0, 1, 2, 3) == 1840690339863724508
    assert stable_hash("a", 1) != stable_hash("a", 2)


def test_all_generators_are_seeded_by_every_part() -> None:
    def drawn(*parts: int) -> tuple[float, float, float]:
        seed_generators(*parts)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = drawn(0, 0, 0, 0)
    assert drawn(0, 0, 0, 0) == first
    for place in range(4):
        other = drawn(*(int(place == one) for one in range(4)))
        assert all(a != b for a, b in zip(first, other, strict=True))
