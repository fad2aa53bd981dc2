"""Which atom correlates most with a residual: exactly, but with most of the arithmetic in 16 bits.

Correlations of all atoms with all residuals are what matching pursuit spends its time on. A CPU that multiplies
bfloat16 does so at several times the speed of float32. Rounding an atom a and a residual r to â and r̂ moves their
product by at most

    |a·r - â·r̂| <= ||a - â|| ||r|| + ||â|| ||r - r̂||        (Cauchy and Schwarz)

and these four lengths are known. So the rounded products leave a handful of atoms that can be the largest at all, and
only these are multiplied again in full precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Dictionary", "fast_bfloat16"]

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
