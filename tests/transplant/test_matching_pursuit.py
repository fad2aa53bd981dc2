"""Matching pursuit against the plainest float64 loop, its invariances, and where arithmetic runs out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import generator, prop, seeds
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.matching_pursuit import combine, omp, omp_path


def slow_omp(x: Tensor, atoms: Tensor, k: int, unit: bool) -> tuple[list[int], Tensor]:
    """One target in float64: the largest inner product, then least squares on all that was chosen."""
    x, atoms = x.double(), atoms.double()
    shown = atoms / atoms.norm(dim=1, keepdim=True) if unit else atoms
    support: list[int] = []
    residual, weights = x, x.new_zeros(0)
    for _ in range(k):
        score = (shown @ residual).abs()
        score[support] = -1.0
        support.append(int(score.argmax()))
        weights = torch.linalg.lstsq(atoms[support].T, x[:, None]).solution[:, 0]
        residual = x - weights @ atoms[support]
    return support, weights


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def error(targets: Tensor, atoms: Tensor, k: int, **settings: object) -> Tensor:
    """``(T,)`` relative residuals, computed in float64 from what was returned."""
    sparse = omp(targets, atoms, k, **settings)  # type: ignore[arg-type]
    left = targets.double() - combine(sparse, atoms.double())
    return left.norm(dim=1) / targets.double().norm(dim=1)


@prop(25)
@given(seed=seeds, n=st.integers(5, 60), d=st.integers(6, 20), k=st.integers(1, 5), unit=st.booleans(),
       screen=st.booleans(), batch=st.sampled_from((None, 1, 3)))  # fmt: skip
def test_naive_loop(seed: int, n: int, d: int, k: int, unit: bool, screen: bool, batch: int | None) -> None:
    targets = drawn(seed, 5, d)
    atoms = drawn(seed + 1, n, d) * drawn(seed + 2, n, 1).exp()
    sparse = omp(targets, atoms, k, selection="unit" if unit else "inner", screen=screen, batch=batch)
    for row, x in enumerate(targets):
        support, weights = slow_omp(x, atoms, k, unit)
        assert sparse.indices[row].tolist() == support
        torch.testing.assert_close(sparse.weights[row], weights, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("screen", [False, True])
def test_float32(dtype: torch.dtype, screen: bool) -> None:
    targets, atoms = drawn(0, 33, 48, dtype=dtype), drawn(1, 500, 48, dtype=dtype)
    sparse = omp(targets, atoms, 8, screen=screen)
    assert sparse.weights.dtype == torch.float32
    for row, x in enumerate(targets):
        support, weights = slow_omp(x, atoms, 8, unit=False)
        assert sparse.indices[row].tolist() == support
        torch.testing.assert_close(sparse.weights[row].double(), weights, rtol=1e-5, atol=1e-5)


@prop(20)
@given(seed=seeds, d=st.integers(30, 40), extra=st.integers(0, 20), sparsity=st.integers(1, 5), screen=st.booleans())
def test_planted_sums_are_found_and_carry_over(seed: int, d: int, extra: int, sparsity: int, screen: bool) -> None:
    # An orthonormal basis, in which greedy choices are right, and atoms that are spread over all of it.
    basis = torch.linalg.qr(drawn(seed, d, d)).Q
    atoms = torch.cat([basis, basis.sum(0).expand(extra, -1) / d + 0.01 * drawn(seed + 1, extra, d)])
    support = torch.stack([torch.randperm(d, generator=generator(seed + i))[:sparsity] for i in range(4)])
    weights = 1 + drawn(seed + 2, 4, sparsity).abs()
    targets = torch.einsum("tk,tkd->td", weights, atoms[support])
    sparse = omp(targets, atoms, sparsity, selection="unit", screen=screen)
    assert torch.equal(sparse.indices.sort(1).values, support.sort(1).values)
    other = drawn(seed + 3, len(atoms), 7)
    torch.testing.assert_close(combine(sparse, other), torch.einsum("tk,tkd->td", weights, other[support]))


@prop(20)
@given(seed=seeds, unit=st.booleans(), scale=st.sampled_from((1e-3, 1.0, 64.0)), screen=st.booleans())
def test_rotation_scale_and_order_of_atoms(seed: int, unit: bool, scale: float, screen: bool) -> None:
    targets, atoms = drawn(seed, 6, 16), drawn(seed + 1, 70, 16)
    settings = {"selection": "unit" if unit else "inner", "screen": screen}
    first = omp(targets, atoms, 5, **settings)
    turn = torch.linalg.qr(drawn(seed + 2, 16, 16)).Q * scale
    order = torch.randperm(len(atoms), generator=generator(seed))
    second = omp(targets @ turn, (atoms @ turn)[order], 5, **settings)
    assert torch.equal(order[second.indices], first.indices)
    torch.testing.assert_close(second.weights, first.weights)


@prop(10)
@given(seed=seeds, unit=st.booleans())
def test_a_path_is_the_runs_it_stands_for(seed: int, unit: bool) -> None:
    targets, atoms = drawn(seed, 4, 12), drawn(seed + 1, 30, 12)
    selection = "unit" if unit else "inner"
    for k, sparse in omp_path(targets, atoms, [2, 7, 4], selection=selection).items():
        alone = omp(targets, atoms, k, selection=selection)
        assert torch.equal(sparse.indices, alone.indices)
        torch.testing.assert_close(sparse.weights, alone.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("screen", [False, True])
def test_more_atoms_than_dimensions(dtype: torch.dtype, screen: bool) -> None:
    targets, atoms = drawn(0, 20, 12, dtype=dtype), drawn(1, 200, 12, dtype=dtype)
    sparse = omp(targets, atoms, 64, screen=screen)
    assert int(sparse.count.max()) <= 12
    assert float(sparse.weights.abs().max()) < 1e3
    assert float(error(targets, atoms, 64, screen=screen).max()) < 100 * torch.finfo(dtype).eps


def test_dependent_atoms() -> None:
    # Rank 6, every atom three times: nothing outside the span can be reached, and weights stay small.
    atoms = (drawn(0, 60, 6) @ drawn(1, 6, 40)).repeat(3, 1).float()
    targets = drawn(2, 25, 40).float()
    sparse = omp(targets, atoms, 16)
    assert int(sparse.count.max()) <= 6
    best = torch.linalg.lstsq(atoms.double().T, targets.double().T, rcond=1e-5, driver="gelsd").solution
    floor = (targets.double() - best.T @ atoms.double()).norm(dim=1) / targets.double().norm(dim=1)
    torch.testing.assert_close(error(targets, atoms, 16), floor, rtol=1e-4, atol=1e-5)
    for row in sparse.indices:
        used = row[row >= 0] % 60
        assert len(set(used.tolist())) == len(used)


def test_equal_atoms_give_the_first() -> None:
    atoms = torch.eye(4).repeat(40, 1)
    for screen in (False, True):
        assert omp(torch.tensor([[0.0, 3.0, 1.0, 0.0]]), atoms, 3, screen=screen).indices.tolist() == [[1, 2, -1]]


def test_atoms_and_targets_of_zeros() -> None:
    atoms = drawn(0, 10, 5).float()
    atoms[[0, 3, 9]] = 0.0
    targets = drawn(1, 4, 5).float()
    targets[2] = 0.0
    sparse = omp(targets, atoms, 4)
    assert sparse.count.tolist() == [4, 4, 0, 4]
    assert not torch.isin(sparse.indices, torch.tensor([0, 3, 9])).any()
    assert sparse.indices[2].tolist() == [-1] * 4
    assert float(sparse.weights[2].abs().sum()) == 0
    assert omp(targets, torch.zeros(6, 5), 3).count.tolist() == [0] * 4
    assert omp(targets[:0], atoms, 3).indices.shape == (0, 3)


@pytest.mark.parametrize("ratio", [10.0, 100.0])
def test_strong_common_mean(ratio: float) -> None:
    # Mean over noise: float32 must reach what float64 reaches with the same atoms, and does without being centred.
    mean = drawn(5, 1, 64)
    targets, atoms = drawn(0, 40, 64) + ratio * mean, drawn(1, 800, 64) + ratio * mean
    least = error(targets, atoms, 16) * targets.norm(dim=1)
    reached = error(targets.float(), atoms.float(), 16) * targets.norm(dim=1)
    assert float(reached.mean()) < 1.05 * float(least.mean())


def test_long_atoms() -> None:
    atoms = drawn(0, 400, 32)
    atoms[:20] *= 5
    targets = drawn(1, 50, 32)
    long = {s: float((omp(targets, atoms, 4, selection=s).indices < 20).double().mean()) for s in ("inner", "unit")}
    assert long["inner"] > 0.8
    assert long["unit"] < 0.15
    assert error(targets, atoms, 4, selection="unit").mean() < error(targets, atoms, 4).mean()


def test_tolerance_stops_each_target_alone() -> None:
    atoms = torch.eye(30)
    targets = torch.zeros(7, 30)
    for row in range(7):
        targets[row, : row + 1] = torch.arange(row + 1, 0, -1).float()
    assert omp(targets, atoms, 10).count.tolist() == [1, 2, 3, 4, 5, 6, 7]
    sparse = omp(targets, atoms, 10, tolerance=0.3)
    for row, used in enumerate(sparse.count.tolist()):
        left = [math.sqrt(sum(i * i for i in range(1, row + 2 - n))) for n in range(row + 2)]
        assert used == next(n for n, r in enumerate(left) if r <= 0.3 * left[0])


def test_almost_dependent_atoms_stay_exact() -> None:
    # Pairs that differ by 1e-3: one pass of Gram-Schmidt loses the digits that the weights need.
    first = drawn(0, 12, 40)
    atoms = torch.cat([first, first + 1e-3 * drawn(1, 12, 40)])
    targets = torch.einsum("tk,kd->td", drawn(2, 6, 24), atoms)
    assert float(error(targets, atoms, 24).max()) < 1e-9
    assert float(error(targets.float(), atoms.float(), 24).max()) < 1e-4


def test_memory_bounds_the_batch() -> None:
    seen: list[tuple[int, int]] = []
    omp(drawn(0, 10, 8), drawn(1, 300, 8), 2, memory=10_000, progress=lambda done, all_: seen.append((done, all_)))
    assert seen[-1] == (10, 10)
    assert len(seen) > 3


def test_all_finished_leave_the_batch() -> None:
    # Half the targets are atoms, so half the batch leaves after one step; the others must not be disturbed.
    atoms = drawn(0, 100, 20)
    targets = torch.cat([atoms[:30] * 2, drawn(1, 10, 20)])[torch.randperm(40, generator=generator(2))]
    together = omp(targets, atoms, 8, selection="unit")
    for row in range(40):
        alone = omp(targets[row : row + 1], atoms, 8, selection="unit")
        assert torch.equal(alone.indices[0], together.indices[row])
        torch.testing.assert_close(alone.weights[0], together.weights[row])
    assert sorted(together.count.tolist())[:30] == [1] * 30


@prop(15)
@given(seed=seeds, spread=st.sampled_from((0.0, 0.01, 0.3, 1.0)))
def test_screening_changes_nothing(seed: int, spread: float) -> None:
    # Atoms around one direction are more alike than 16 bits can tell; exact ties are a matter of rounding.
    targets = drawn(seed, 30, 24, dtype=torch.float32)
    atoms = (drawn(seed + 1, 1, 24) + spread * drawn(seed + 2, 300, 24)).float() if spread else drawn(seed, 300, 24)
    first = (targets.double() @ atoms.double().T).abs().topk(2).values
    assume(float(((first[:, 0] - first[:, 1]) / first[:, 0]).min()) > 1e-6)
    plain, screened = (omp(targets.double(), atoms.double(), 5, screen=screen) for screen in (False, True))
    assert torch.equal(plain.indices, screened.indices)
    torch.testing.assert_close(plain.weights, screened.weights)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 11}, "k must be at most the number of atoms, 10, got 11"),
        ({"selection": "units"}, "did you mean 'unit'"),
        ({"targets": torch.zeros(3, 4)}, "same d"),
        ({"targets": torch.full((3, 5), math.nan)}, "targets must hold finite"),
    ],
)
def test_what_it_refuses(settings: dict[str, object], words: str) -> None:
    given_ = {"targets": torch.ones(3, 5), "atoms": torch.ones(10, 5), "k": 2, **settings}
    with pytest.raises(QuickmergeError, match=words):
        omp(given_.pop("targets"), given_.pop("atoms"), given_.pop("k"), **given_)  # type: ignore[arg-type]


def test_settings_out_of_range() -> None:
    for settings in ({"tolerance": -1.0}, {"batch": 0}, {"memory": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            omp(torch.ones(2, 3), torch.eye(3), 1, **settings)  # type: ignore[arg-type]
