"""The steps of orthogonal matching pursuit, for a batch of targets.

The span of the chosen atoms is held as an orthonormal basis Q with A_support = Q R, so that only one direction q is new
in each step: r <- r - q (q·r). The weights are R^-1 Q^T x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.vocabulary.screening import Dictionary
from quickmerge.vocabulary.sparse import Sparse

__all__ = ["Pursuit"]

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
