"""The benchmark's own matching pursuit, and how it tells where two runs part."""

from __future__ import annotations

import torch
from omp_speed import differences, plain_omp, products, speedup
from strategies import generator

from quickmerge.transplant.matching_pursuit import Sparse, omp


def test_the_straightforward_form_is_matching_pursuit() -> None:
    rng = generator(0)
    targets, atoms = torch.randn(300, 24, generator=rng), torch.randn(90, 24, generator=rng)  # more than one batch
    plain, ours = plain_omp(targets, atoms, 6), omp(targets, atoms, 6)
    told = differences(targets, atoms, plain, ours)
    assert told["targets"] == 0
    assert told["weights_apart"] < 1e-5
    products(targets, atoms, 6)


def test_a_difference_is_told_with_its_gap() -> None:
    atoms = torch.eye(4)
    targets = torch.tensor([[8.0, 4.0, 2.0, 1.0]])
    first = Sparse(torch.tensor([[0, 1]]), torch.tensor([[8.0, 4.0]]))
    second = Sparse(torch.tensor([[0, 2]]), torch.tensor([[8.0, 2.0]]))
    told = differences(targets, atoms, first, second)
    assert told["targets"] == 1
    assert told["largest_gap"] == 0.5


def test_ratios() -> None:
    told = speedup([4.0, 6.0], [2.0, 3.0])
    assert told == {"ratio": 2.0, "low": 2.0, "high": 2.0}
