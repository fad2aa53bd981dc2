"""Screening in 16 bits: its bound holds, and it falls back where it can tell nothing apart."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import generator, prop, seeds

from quickmerge.transplant.matching_pursuit import MOST, UNIT, Dictionary


@prop(30)
@given(seed=seeds, n=st.integers(3, 300), d=st.integers(1, 70), taken=st.integers(0, 2), spread=st.sampled_from((0, 1)),
       double=st.booleans())  # fmt: skip
def test_the_largest_product(seed: int, n: int, d: int, taken: int, spread: int, double: bool) -> None:
    dtype = torch.float64 if double else torch.float32
    rng = generator(seed)
    atoms = (
        torch.randn(n, d, generator=rng, dtype=dtype) * (spread * torch.randn(n, 1, generator=rng, dtype=dtype)).exp()
    )
    residual = torch.randn(9, d, generator=rng, dtype=dtype) * 1e-20
    gone = torch.randint(n, (9, taken), generator=rng)
    got = Dictionary(atoms, screen=True).pick(residual, gone)
    products = (residual.double() @ atoms.double().T).abs().scatter(1, gone, -1.0)
    assert not (got[:, None] == gone).any()
    reached = products.gather(1, got[:, None])[:, 0]
    assert (reached >= products.amax(1) * (1 - 20 * torch.finfo(dtype).eps * d)).all()


def test_the_bound_is_needed_and_holds() -> None:
    # Two atoms that bfloat16 makes equal, and one between them that it makes the largest.
    base = torch.full((64,), 1.0)
    better, worse = base.clone(), base.clone()
    better[0] += UNIT / 4  # rounds down to 1
    worse[1] = 1.0 - UNIT / 16
    atoms = torch.stack([worse, better, base, -base])
    assert torch.equal(atoms[1].bfloat16(), atoms[2].bfloat16())
    residual = torch.ones(5, 64)
    assert Dictionary(atoms, screen=True).pick(residual, torch.empty(5, 0, dtype=torch.long)).tolist() == [1] * 5


def test_atoms_too_alike_are_multiplied_in_full() -> None:
    rng = generator(0)
    atoms = torch.randn(1, 50, generator=rng) + 1e-4 * torch.randn(10 * MOST, 50, generator=rng)
    table = Dictionary(atoms, screen=True)
    assert table.rounded is not None
    residual = torch.randn(7, 50, generator=rng)
    nothing = torch.empty(7, 0, dtype=torch.long)
    exact = (residual.double() @ atoms.double().T).abs()
    for _ in range(2):  # while screening, and after it has given up
        reached = exact.gather(1, table.pick(residual, nothing)[:, None])[:, 0]
        torch.testing.assert_close(reached, exact.amax(1), rtol=1e-5, atol=1e-5)
        assert table.rounded is None


def test_what_is_taken_stays_taken_where_all_else_is_zero() -> None:
    atoms = torch.eye(40)
    residual = 3 * torch.eye(40)[:5]
    taken = torch.arange(5)[:, None]
    got = Dictionary(1000 * atoms, screen=True).pick(residual, taken)
    assert not (got[:, None] == taken).any()
    assert ((got >= 0) & (got < 40)).all()


def test_few_atoms_are_not_screened() -> None:
    assert Dictionary(torch.randn(100, 8)).rounded is None
