"""Pool: average pooling of neighbouring patches, which looks at nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.reducers.base import Reducer
from quickmerge.reducers.grid import lattice
from quickmerge.tokens.budget import fixed_count
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView

Grid = tuple[int, int, int]

TOWARD_MIDDLE = 0.25
"""By how much of a cell slots count as back and up, so that of two that are as near the later takes a patch."""


@dataclass(frozen=True)
class Pool(Reducer):
    """Average neighbouring patches by place alone: the floor for methods that look at what they merge.

    The patches on an even lattice over the grid stay, and each other one merges into the nearest of them, weighted by
    size. Slots stand where those that stayed do. Attention above the merge adds log(size).

    Behind p protected tokens the patch at position p + c is the c-th of ``view.grid`` (T, H, W), so views that were
    merged before will do. One patch is left at least.

    Args:
        keep: share of the tokens kept, or a budget that needs no saliency.
    """

    name: ClassVar[str] = "pool"
    proportional: ClassVar[bool] = True
    once: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("vision",)

    def plan(self, view: TokenView) -> MergePlan:
        """Merge by place.

        Raises:
            ValueError: if the view has no grid, or a patch stands outside of it.
        """
        if view.grid is None:
            raise ValueError("grid must be (T, H, W), how many patches a view has along each axis, got none")
        left = fixed_count(self.budget, view)
        if left is None or view.prefix is None:
            return self._row_by_row(view, view.grid)
        prefix, patches = view.prefix, view.hidden.shape[1] - view.prefix
        keep = max(left - prefix, 1)
        if keep >= patches:
            return MergePlan.identity(view)
        source, into = pool(view.position[:, prefix:] - prefix, view.grid, keep)
        return MergePlan.from_moves(view, source + prefix, into + prefix, view.size)

    def _row_by_row(self, view: TokenView, grid: Grid) -> MergePlan:
        """The same for rows of different lengths."""
        counts = self.budget.count(view, None).tolist()
        anchor, leader = view.valid.clone(), torch.full_like(view.position, -1)
        for row, count in enumerate(counts):
            free = view.free[row].nonzero().flatten()
            fixed = int((view.protected & view.valid)[row].sum())
            keep, cell = max(count - fixed, 1), view.position[row, free] - fixed
            outside = (cell < 0) | (cell >= math.prod(grid))
            if bool(outside.any()):
                raise ValueError(
                    f"position must lie in {fixed}..{math.prod(grid) + fixed - 1}, inside the grid {grid} behind "
                    f"{fixed} protected tokens, got {int(cell[outside][0]) + fixed}"
                )
            if keep < len(free):
                source, into = pool(cell[None], grid, keep)
                anchor[row, free[source[0]]] = False
                leader[row, free[source[0]]] = free[into[0]]
        return MergePlan.from_anchors(view, anchor, leader, view.size)


def pool(cell: Tensor, grid: Grid, keep: int) -> tuple[Tensor, Tensor]:
    """Which patches go, rising, and for each the one that takes it: the nearest, of two that are as near the later.

    Those on a lattice of ``keep`` cells stay. Where cells of it are empty, those patches do that are nearest to one.
    Where the grid divides evenly, groups are the blocks of average pooling.

    Args:
        cell: ``(B, M)`` long, rising, where each patch stands in the grid; no two at the same place.
        grid: (T, H, W).
        keep: how many stay, fewer than M.

    Returns:
        Both ``(B, M - keep)`` long, in ``0..M-1``.
    """
    b, m = cell.shape
    seats = torch.tensor(lattice(keep, grid), device=cell.device)
    chosen = torch.zeros(math.prod(grid), dtype=torch.bool, device=cell.device).scatter(0, seats, True)
    score = chosen[cell].to(torch.float32)
    if m < math.prod(grid):
        taken = torch.zeros(b, math.prod(grid), device=cell.device).scatter(1, cell, 1.0)
        distance = _squares(cell, seats.expand(b, -1), grid)
        distance = distance.masked_fill((taken[:, seats] > 0)[:, None], torch.inf)
        score = torch.where(score > 0, score, -distance.amin(-1))
    order = score.argsort(dim=-1, descending=True, stable=True)
    stays, source = order[:, :keep].sort(-1).values, order[:, keep:].sort(-1).values
    # Cells of the lattice stand right of and below the middle of an even block, by half a cell.
    nearest = _squares(cell.gather(1, source), cell.gather(1, stays), grid, TOWARD_MIDDLE).argmin(-1)
    return source, stays.gather(1, nearest)


def _squares(one: Tensor, other: Tensor, grid: Grid, shift: float = 0.0) -> Tensor:
    """Squared distances ``(B, M, K)`` of cells ``(B, M)`` from cells ``(B, K)`` moved back by ``shift``; exact."""
    total = torch.zeros(1, device=one.device)
    for step, length in ((grid[1] * grid[2], grid[0]), (grid[2], grid[1]), (1, grid[2])):
        a, b = (x // step % length for x in (one, other))
        total = total + ((a[:, :, None] - b[:, None]).to(torch.float32) + shift).square()
    return total
