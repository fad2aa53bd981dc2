"""Orthogonal matching pursuit: each target as a weighted sum of few atoms.

Source: Pati, Rezaiifar and Krishnaprasad 1993; for tokenizer transplantation: Goddard and Fernandes Neto 2025
(arXiv 2506.06607). For a target x, with r = x and an empty support at first, k times:

    j = argmax_i |a_i·r|          over the atoms outside the support
    support += j
    r = x - (projection of x on the span of the support)

and the weights are those of least squares on the support.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, number_at_least, whole_number
from quickmerge.vocabulary.pursuit import Pursuit
from quickmerge.vocabulary.screening import Dictionary
from quickmerge.vocabulary.sparse import Sparse, combine

__all__ = ["MEMORY", "SELECTIONS", "Sparse", "combine", "omp", "omp_path"]

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
