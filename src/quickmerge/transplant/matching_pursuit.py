"""Vectors as weighted sums of few others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, number_at_least, whole_number

__all__ = ["MEMORY", "SELECTIONS", "Dictionary", "Pursuit", "Sparse", "combine", "fast_bfloat16", "omp", "omp_path"]


@dataclass(frozen=True)
class Sparse:
    """Each of T targets as a sum of at most k atoms.

    Attributes:
        indices: ``(T, k)`` long, the atoms in the order in which they were chosen; -1: unused, always last.
        weights: ``(T, k)``, zero where unused.
    """

    indices: Tensor
    weights: Tensor

    @property
    def count(self) -> Tensor:
        """``(T,)`` long, how many atoms each target uses."""
        return (self.indices >= 0).sum(1)

    @property
    def total(self) -> Tensor:
        """``(T,)``, the sum of each target's weights."""
        return self.weights.sum(1)


def combine(sparse: Sparse, rows: Tensor) -> Tensor:
    """``(T, d)``: the weighted sums of ``rows (N, d)``."""
    out = rows.new_zeros(len(sparse.indices), rows.shape[1])
    for index, weight in zip(sparse.indices.T, sparse.weights.T.to(rows.dtype), strict=True):
        out.addcmul_(rows[index.clamp_min(0)], weight[:, None])
    return out


# Which atom correlates most with a residual: exactly, but with most of the arithmetic in 16 bits.
#
# Correlations of all atoms with all residuals are what matching pursuit spends its time on. A CPU that multiplies
# bfloat16 does so at several times the speed of float32. Rounding an atom a and a residual r to â and r̂ moves their
# product by at most
#
#     |a·r - â·r̂| <= ||a - â|| ||r|| + ||â|| ||r - r̂||        (Cauchy and Schwarz)
#
# and these four lengths are known. So the rounded products leave a handful of atoms that can be the largest at all, and
# only these are multiplied again in full precision.


FOLDS = 6
"""How often the products are folded in half, by maximum, before anybody looks at one: 64 atoms to a place."""
MOST = 32
"""Candidates of one residual that are multiplied again; where more are left all atoms are."""
WORTH = 2048
"""Atoms from which screening pays."""
UNIT = 2.0**-8
"""What rounding to bfloat16 changes a number by at most, relative to the result."""


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself, instead of through float32."""
    # torch offers no public word for it.
    return any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile"))


class Dictionary:
    """Atoms to choose from.

    Memory beside the atoms: a copy in bfloat16, where screening; and at most ``per_residual`` bytes at a time for each
    residual.

    Args:
        atoms: ``(N, d)`` in float32 or float64, on the CPU.
        screen: whether to screen in bfloat16. Default: where the CPU is fast at it and the atoms are many.
    """

    def __init__(self, atoms: Tensor, screen: bool | None = None) -> None:
        self.atoms = atoms
        self.rounded: Tensor | None = None
        self._rooms: dict[torch.dtype, Tensor] = {}
        if screen is None:
            screen = atoms.device.type == "cpu" and len(atoms) >= WORTH and fast_bfloat16()
        if screen and atoms.numel():
            size = -(-len(atoms) // 2**FOLDS) * 2**FOLDS
            self.rounded = atoms.new_zeros(size, atoms.shape[1], dtype=torch.bfloat16)
            self.rounded[: len(atoms)] = atoms
            self.error = self.size = 0.0
            for exact, near in zip(torch.split(atoms, 8192), torch.split(self.rounded, 8192), strict=False):
                near = near[: len(exact)].to(exact.dtype)
                self.error = max(self.error, float((exact - near).norm(dim=1).max()))
                self.size = max(self.size, float(near.norm(dim=1).max()))

    @property
    def per_residual(self) -> int:
        """Bytes that `pick` needs for each residual, at most."""
        full = len(self.atoms) * self.atoms.element_size()
        few = MOST * self.atoms.shape[1] * self.atoms.element_size() * 3
        return full if self.rounded is None else full + 4 * len(self.rounded) + few

    def pick(self, residual: Tensor, taken: Tensor) -> Tensor:
        """The atom with the largest absolute inner product, the first of equals.

        Args:
            residual: ``(T, d)``.
            taken: ``(T, t)`` long, atoms that can't be picked again; fewer than all.

        Returns:
            ``(T,)`` long.
        """
        if self.rounded is None:
            return self._full(residual, taken)
        products, slack = self._rounded(residual)
        return self._look(_without(products.abs_(), taken), slack, residual, taken)

    def _full(self, residual: Tensor, taken: Tensor) -> Tensor:
        return _without(self._products(residual, self.atoms).abs_(), taken).max(1).indices

    def _products(self, residual: Tensor, atoms: Tensor) -> Tensor:
        """``(T, N)`` inner products; valid until the next call."""
        size = len(residual) * len(atoms)
        room = self._rooms.get(residual.dtype)
        if room is None or room.numel() < size:
            room = self._rooms[residual.dtype] = residual.new_empty(size)  # asking the system anew costs as much as abs
        return torch.mm(residual, atoms.T, out=room[:size].view(len(residual), -1))

    def _rounded(self, residual: Tensor) -> tuple[Tensor, Tensor]:
        """``(T, N')`` bfloat16 products, and ``(T,)`` what they may be off by beside a share `UNIT` of each."""
        assert self.rounded is not None
        near = residual.to(torch.bfloat16)
        length = residual.norm(dim=1)
        slack = self.error * length + self.size * (residual - near.to(residual.dtype)).norm(dim=1)
        # Sums of d products are rounded too: once in float32 while screening, once more in the second look.
        slack += (len(residual.T) + 8) * 2.0**-22 * self.size * length
        return self._products(near, self.rounded), slack.float()

    def _look(self, products: Tensor, slack: Tensor, residual: Tensor, taken: Tensor) -> Tensor:
        """The largest, from absolute products that may be off."""
        count = len(residual)
        products[:, len(self.atoms) :] = -1.0
        top = products
        for _ in range(FOLDS):
            top = torch.maximum(*top.chunk(2, dim=1))
        # What is taken holds -1, and stays below.
        least = ((top.amax(1).float() * (1 - UNIT) - 2 * slack) / (1 + UNIT)).clamp_min_(0.0)[:, None]
        row, place = (top.float() >= least).nonzero(as_tuple=True)
        many = torch.bincount(row, minlength=count) > MOST
        row, place = row[~many[row]], place[~many[row]]
        fold = products.view(count, 2**FOLDS, -1)[row, :, place]
        which, member = (fold.float() >= least[row]).nonzero(as_tuple=True)
        row, atom = row[which], member * top.shape[1] + place[which]
        left = torch.bincount(row, minlength=count)
        many |= left > MOST
        found = torch.full((count,), len(self.atoms), device=row.device)
        found[row] = atom  # right where only one is left
        several = (left[row] > 1) & ~many[row]
        row, atom = row[several], atom[several]

        exact = (self.atoms[atom] * residual[row]).sum(1).abs_()
        best = exact.new_full((count,), -1.0).scatter_reduce_(0, row, exact, "amax")
        wins = exact == best[row]
        found.scatter_reduce_(0, row[wins], atom[wins], "amin", include_self=False)
        if bool(many.any()):
            found[many] = self._full(residual[many], taken[many])
            if 2 * int(many.sum()) > count:
                self.rounded = None  # these atoms are too alike to be told apart in 16 bits
        return found


def _without(products: Tensor, taken: Tensor) -> Tensor:
    """``(T, N)`` with -1 in the places ``taken (T, t)``; in place."""
    start = torch.arange(len(taken), device=taken.device)[:, None] * products.shape[1]
    products.view(-1).index_fill_(0, (taken + start).flatten(), -1.0)  # scatter_ copies everything
    return products


# The steps of orthogonal matching pursuit, for a batch of targets.
#
# The span of the chosen atoms is held as an orthonormal basis Q with A_support = Q R, so that only one direction q is
# new in each step: r <- r - q (q·r). The weights are R^-1 Q^T x.


DEPENDENT = 100.0
"""Units in the last place: an atom whose new part is shorter than so many of itself has nothing new."""
SPENT = 32.0
"""Units in the last place: a residual shorter than so many of its target is what rounding left."""


class Pursuit:
    """Some targets on their way, one step for all of them at a time; who has finished leaves.

    The basis is held twice, ``(n, k, d)`` and ``(n, d, k)``: products with one of the two always run along memory.
    """

    def __init__(self, targets: Tensor, where: Tensor, table: Dictionary, k: int) -> None:
        count, width = targets.shape
        self.table, self.k, self.where = table, k, where
        self.residual = targets.clone()
        self.length = targets.norm(dim=1)
        self.basis = targets.new_empty(count, k, width)  # never read where it isn't written yet
        self.basis_t = targets.new_empty(count, width, k)
        self.triangle = torch.eye(k, dtype=targets.dtype, device=targets.device).repeat(count, 1, 1)
        self.along = targets.new_zeros(count, k)  # Q^T x
        self.chosen = torch.zeros(count, k, dtype=torch.long, device=targets.device)
        self.used = torch.zeros(count, dtype=torch.long, device=targets.device)
        self.going = torch.ones(count, dtype=torch.bool, device=targets.device)

    def run(self, tolerance: float, found: dict[int, Sparse]) -> None:
        """Up to k steps; writes into ``found``, by numbers of atoms, the rows ``where`` of each."""
        unit = torch.finfo(self.residual.dtype).eps
        for step in range(self.k):
            self.going &= self.residual.norm(dim=1) > max(tolerance, SPENT * unit) * self.length
            if not bool(self.going.any()):
                break
            if 4 * int(self.going.sum()) < 3 * len(self.going):
                self._write(~self.going, found)
                self._keep(self.going)
            self._step(step, DEPENDENT * unit)
        self._write(torch.ones_like(self.going), found)

    def _step(self, step: int, unit: float) -> None:
        atom_index = self.table.pick(self.residual, self.chosen[:, :step])
        atom = self.table.atoms[atom_index]
        length = atom.norm(dim=1)
        new, height = self._orthogonal(atom, length, step)
        size = new.norm(dim=1)
        self.going &= size > unit * length
        new = new / size.clamp_min(torch.finfo(new.dtype).tiny)[:, None] * self.going[:, None]
        share = (new * self.residual).sum(1)
        self.residual.addcmul_(new, share[:, None], value=-1)
        self.basis[:, step] = new
        self.basis_t[:, :, step] = new
        self.triangle[:, :step, step] = height * self.going[:, None]
        self.triangle[:, step, step] = torch.where(self.going, size, 1.0)
        self.along[:, step] = share
        self.chosen[:, step] = atom_index
        self.used += self.going

    def _weights(self, rows: Tensor | slice, m: int) -> Tensor:
        """``(n, m)``, of the first m atoms."""
        right = self.along[rows, :m, None]
        out: Tensor = torch.linalg.solve_triangular(self.triangle[rows, :m, :m], right, upper=True)
        return out[..., 0]

    def _orthogonal(self, atom: Tensor, length: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What of the atoms is orthogonal to the basis, and their coordinates in it ``(n, step)``."""
        height = atom.new_zeros(len(atom), step)
        before = length
        for _ in range(2 if step else 0):
            more = torch.bmm(atom[:, None], self.basis_t[:, :, :step])
            atom = atom - torch.bmm(more, self.basis[:, :step])[:, 0]
            height += more[:, 0]
            # "Twice is enough" (Kahan and Parlett), and once where little was taken away.
            after = atom.norm(dim=1)
            if bool((after > 0.5 * before).all()):
                break
            before = after
        return atom, height

    def _write(self, rows: Tensor, found: dict[int, Sparse]) -> None:
        where, used = self.where[rows], self.used[rows]
        for k, sparse in found.items():
            m = min(k, self.k)
            weights = self._weights(rows, m)
            unused = torch.arange(m, device=used.device) >= used[:, None]
            sparse.weights[where, :m] = weights.masked_fill(unused, 0.0)
            sparse.indices[where, :m] = self.chosen[rows, :m].masked_fill(unused, -1)

    def _keep(self, rows: Tensor) -> None:
        for name, value in list(vars(self).items()):
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])


# Orthogonal matching pursuit: each target as a weighted sum of few atoms.
#
# Source: Pati, Rezaiifar and Krishnaprasad 1993; for tokenizer transplantation: Goddard and Fernandes Neto 2025
# (arXiv 2506.06607). For a target x, with r = x and an empty support at first, k times:
#
#     j = argmax_i |a_i·r|          over the atoms outside the support
#     support += j
#     r = x - (projection of x on the span of the support)
#
# and the weights are those of least squares on the support.


MEMORY = 512 * 2**20
"""Bytes that the targets worked on at once may take, unless told otherwise."""
SELECTIONS = ("unit", "inner")
LARGEST_BATCH = 256
"""More targets at once are no faster: their basis no longer fits in a cache."""


def omp(
    targets: Tensor,
    atoms: Tensor,
    k: int,
    *,
    selection: str = "inner",
    tolerance: float = 0.0,
    batch: int | None = None,
    memory: int = MEMORY,
    screen: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sparse:
    """Orthogonal matching pursuit, for T targets at once.

    A target gets fewer than k atoms when its residual reaches the tolerance or what rounding leaves, or when the best
    atom lies in the span of those already chosen (then no atom outside has anything to add). Atoms of zeros are never
    chosen; a target of zeros uses none. The basis is orthogonalised again where an atom lost much of its length, so
    weights stay accurate for atoms that are almost dependent; yet a strong mean that all atoms share costs digits:
    subtract it first, or give float64.

    Peak memory beside the two inputs: about `memory` bytes (at least what one target takes: 4 N + 8 k d + 4 k^2 bytes
    in float32, and 4 N more where screening), and 2 N d bytes where screening, 4 N d more for "unit".

    Args:
        targets: ``(T, d)``.
        atoms: ``(N, d)``. Both in float32 at least, what is less is taken up to it; on one device.
        k: most atoms for each target, at most N.
        selection: "inner": by inner product, as the paper does, where long atoms win easily; "unit": by the inner
            product with atoms of length one. The weights are for the atoms as given in both.
        tolerance: stop a target when ||residual|| <= tolerance ||target||.
        batch: targets at once. Default: as many as `memory` allows, at most 256.
        memory: bytes.
        screen: see `Dictionary`; the choice is the same but for atoms that rounding can't tell apart.
        progress: called with the targets finished and T.

    Raises:
        QuickmergeError: if the two don't fit one another, k exceeds N, or a number isn't finite.
        ValueError: for a setting out of range.
    """
    settings: dict[str, Any] = {"selection": selection, "tolerance": tolerance, "batch": batch, "memory": memory}
    return omp_path(targets, atoms, [k], **settings, screen=screen, progress=progress)[k]


def omp_path(
    targets: Tensor,
    atoms: Tensor,
    ks: Sequence[int],
    *,
    selection: str = "inner",
    tolerance: float = 0.0,
    batch: int | None = None,
    memory: int = MEMORY,
    screen: bool | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Sparse]:
    """What `omp` gives for each of several k, at the cost of the largest: each support continues the one before.

    Raises:
        QuickmergeError: as `omp`.
        ValueError: as `omp`.
    """
    targets, atoms = _checked(targets, atoms, ks, selection)
    number_at_least("tolerance", tolerance, 0)
    memory = whole_number("memory", memory)
    length = atoms.norm(dim=1)
    live = (length > torch.finfo(atoms.dtype).tiny).nonzero().flatten()
    if len(live) < len(atoms):
        atoms, length = atoms[live], length[live]
    table = Dictionary(atoms / length[:, None] if selection == "unit" else atoms, screen)
    most, width = min(max(ks), len(live)), atoms.shape[1]
    if batch is None:
        each = table.per_residual + (2 * most * width + most**2 + 6 * width) * atoms.element_size()
        batch = max(1, min(LARGEST_BATCH, memory // each))
    batch = whole_number("batch", batch)

    found = {
        k: Sparse(torch.full((len(targets), k), -1, device=atoms.device), atoms.new_zeros(len(targets), k)) for k in ks
    }
    for start in range(0, len(targets), batch):
        where = torch.arange(start, min(start + batch, len(targets)), device=atoms.device)
        pursuit = Pursuit(targets[where], where, table, most)
        pursuit.run(tolerance, found)
        if progress is not None:
            progress(start + len(where), len(targets))
    for sparse in found.values():
        used = sparse.indices.clamp_min(0)
        if selection == "unit" and len(live):
            sparse.weights.div_(length[used])
        if len(live):
            sparse.indices.copy_(torch.where(sparse.indices >= 0, live[used], -1))
    return found


def _checked(targets: Tensor, atoms: Tensor, ks: Sequence[int], selection: str) -> tuple[Tensor, Tensor]:
    if selection not in SELECTIONS:
        hint = near_match(str(selection), SELECTIONS)
        raise QuickmergeError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}{hint}")
    if targets.ndim != 2 or atoms.ndim != 2 or targets.shape[1] != atoms.shape[1]:
        shapes = f"{tuple(targets.shape)} and {tuple(atoms.shape)}"
        raise QuickmergeError(f"targets and atoms must be (T, d) and (N, d) with the same d, got {shapes}")
    if not ks:
        raise QuickmergeError("ks must name at least one k, got none")
    for k in ks:
        k = whole_number("k", k)
        if k > len(atoms):
            raise QuickmergeError(f"k must be at most the number of atoms, {len(atoms)}, got {k}")
    dtype = torch.promote_types(torch.promote_types(targets.dtype, atoms.dtype), torch.float32)
    for name, x in (("targets", targets), ("atoms", atoms)):
        if not bool(torch.isfinite(x).all()):
            raise QuickmergeError(f"{name} must hold finite numbers, got infinite ones or NaN")
    return targets.detach().to(dtype), atoms.detach().to(dtype)
