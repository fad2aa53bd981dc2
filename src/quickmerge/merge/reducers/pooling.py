"""GridMerge: QuickMerge++ for patches of images and video, where there is no attention to read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.budget import fixed_count, select
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView

STEP = 2.0**-10
"""Distances, in squared cells, are compared in steps of this: patches that are the same stay at the same distance."""


@dataclass(frozen=True)
class GridMerge(Reducer):
    """QuickMerge++ (arXiv 2508.13204) on a grid of patches; no model is needed.

    Saliency is the length of a patch's difference from the mean of the patches around it, 3 x 3 of them or 3 x 3 x 3
    with time: ``s_i = ||x_i - mean_{j around i} x_j||``. Of the patches that the budget allows, the share ``coverage``
    goes to an even lattice over the grid, so that no region is empty, and the rest to the most salient. Each other
    patch merges into the anchor a of the least

        ``|p_i - p_a|^2 + similarity ||x_i - x_a||^2 / v``

    where p is a place in cells of the grid and v the mean of ``||x_i - mean x||^2`` over the row, so that neither the
    scale of the features nor their number matters. All original patches count equally in their slot: the plain mean
    is what copying back is closest from. Slots stand where their anchors do, so images are in raster order and video
    is frame by frame.

    The patch at position p is the p-th of ``view.grid`` (T, H, W), so views that were merged before will do. Where
    the budget is spent on protected patches alone, the others have no anchor and are dropped.

    Args:
        keep: share of the patches kept, or a budget such as `Entropy`.
        coverage: share of the kept patches that stand on the lattice, in [0, 1].
        similarity: what a difference in features costs, in squared cells; 0 goes by the place alone.
    """

    coverage: float = 0.5
    similarity: float = 8.0
    name: ClassVar[str] = "grid"
    source: ClassVar[str] = "arXiv 2508.13204"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, most in (("coverage", 1.0), ("similarity", math.inf)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not (number and math.isfinite(value) and 0 <= value <= most):
                allowed = "in [0, 1]" if most == 1 else "of at least 0"
                raise ValueError(f"{name} must be a number {allowed}, got {value!r}")

    def saliency(self, view: TokenView) -> Tensor:
        """``(B, N)`` length of each patch's difference from the mean of those around it; 0 where there are none.

        Raises:
            ValueError: if the view has no grid, or a patch stands outside of it.
        """
        grid, cell = cells(view)
        x, there = spread_out(view, grid, cell)
        around = _box(x, grid) - x
        count = _box(there[..., None].to(x.dtype), grid) - there[..., None].to(x.dtype)
        difference = torch.where(count > 0, x - around / count.clamp_min(1), 0.0)
        length = torch.linalg.vector_norm(difference, dim=-1)
        return torch.where(view.valid, length.gather(1, cell.clamp_max(length.shape[1] - 1)), 0.0)

    def plan(self, view: TokenView) -> MergePlan:
        """Anchors on the lattice and where patches stand out; the others merge into the nearest of them.

        Raises:
            ValueError: if the view has no grid, or a patch stands outside of it.
        """
        saliency = self.saliency(view)
        count = self.budget.count(view, saliency)
        even = (count - (view.protected & view.valid).sum(-1)).double() * self.coverage
        score = torch.where(self._on_lattice(view, (even + 1e-9).floor().long()), torch.inf, saliency)
        anchor = select(score, count, view)
        # Where nothing is left to merge there is nobody to look for.
        leader = self._nearest(view, anchor) if bool((view.valid & ~anchor).any()) else None
        return MergePlan.from_anchors(view, anchor, leader, view.size)

    def _on_lattice(self, view: TokenView, count: Tensor) -> Tensor:
        """``(B, N)`` bool: the patches on a lattice of ``count (B,)`` cells."""
        grid, cell = cells(view)
        mask = torch.zeros(count.shape[0], math.prod(grid) + 1, dtype=torch.bool)
        for row, wanted in enumerate(count.tolist()):
            mask[row, lattice(wanted, grid)] = True
        return mask.to(cell.device).gather(1, cell) & view.free

    def _nearest(self, view: TokenView, anchor: Tensor) -> Tensor:
        """``(B, N)`` long: the free anchor that each patch is nearest to, the earlier one of two; -1 for none."""
        grid, cell = cells(view)
        takes = anchor & view.free
        seats = takes.long().argsort(dim=-1, descending=True, stable=True)[:, : max(1, int(takes.sum(-1).max()))]
        # Over the cells, so that sums run in the same order however the row is padded.
        x, there = spread_out(view, grid, cell)
        total = there.sum(-1)[:, None, None]
        # What is left of equal patches is rounding, and no difference.
        least = total * (8 * torch.finfo(x.dtype).eps * x.abs().amax((1, 2), keepdim=True)).square()
        x = torch.where(there[..., None], x - x.sum(1, keepdim=True) / total, 0.0)
        spread = x.square().sum((1, 2), keepdim=True)
        x = x * torch.where(spread > least, self.similarity * total / spread, 0.0).sqrt()
        inside = cell.clamp_max(math.prod(grid) - 1)
        place = torch.stack(torch.unravel_index(inside, grid), -1).to(x.dtype)
        x = torch.cat([place, x.gather(1, inside[..., None].expand(-1, -1, x.shape[-1]))], -1)
        cost = (_feature_squares(x, seats) / STEP).round().masked_fill(~takes.gather(1, seats)[:, None], torch.inf)
        leader = seats.gather(1, cost.argmin(-1))
        return torch.where(takes.any(-1, keepdim=True) & view.valid, leader, -1)


def lattice(count: int, grid: tuple[int, ...]) -> list[int]:
    """The flat indices of ``count`` cells spread evenly over a grid, rising.

    Layers across the first axis at equal distances, as many as make cubes of the space around each cell; each gets
    its share of the cells and is divided in the same way.

    Args:
        count: how many, at most as many as there are.
        grid: length of each axis.
    """
    if count < 1:
        return []
    length, rest = grid[0], grid[1:]
    if not rest:
        return [(2 * i + 1) * length // (2 * count) for i in range(count)]
    volume = math.prod(rest)
    step = (length * volume / count) ** (1 / max(1, sum(axis > 1 for axis in grid)))
    layers = min(max(int(length / step + 0.5), -(-count // volume), 1), length, count)
    found = []
    for i in range(layers):
        share = (i + 1) * count // layers - i * count // layers
        at = (2 * i + 1) * length // (2 * layers)
        found += [at * volume + inner for inner in lattice(share, rest)]
    return found


def cells(view: TokenView) -> tuple[tuple[int, int, int], Tensor]:
    """The grid, and the cell of each token ``(B, N)`` long; padding gets one past the last.

    Raises:
        ValueError: if the view has no grid, or a token stands outside of it.
    """
    if view.grid is None:
        raise ValueError("grid must be (T, H, W), how many patches a view has along each axis, got none")
    if len(view.grid) != 3 or any(not isinstance(axis, int) or axis < 1 for axis in view.grid):
        raise ValueError(f"grid must be three whole numbers (T, H, W) of at least 1, got {view.grid!r}")
    count = math.prod(view.grid)
    outside = view.valid & ((view.position < 0) | (view.position >= count))
    if bool(outside.any()):
        raise ValueError(
            f"position must lie in 0..{count - 1}, inside the grid {view.grid}, got {int(view.position[outside][0])}"
        )
    return view.grid, torch.where(view.valid, view.position, count)


def spread_out(view: TokenView, grid: tuple[int, int, int], cell: Tensor) -> tuple[Tensor, Tensor]:
    """Features by cell ``(B, T H W, D)``, zero where no token stands, and where one does ``(B, T H W)`` bool."""
    count = math.prod(grid)
    x = view.hidden.to(_precise(view))
    out = x.new_zeros(x.shape[0], count + 1, x.shape[-1])
    out = out.scatter(1, cell[..., None].expand_as(x), x)[:, :count]
    there = torch.zeros(x.shape[0], count + 1, dtype=torch.bool, device=x.device).scatter(1, cell, True)[:, :count]
    return out, there


def _precise(view: TokenView) -> torch.dtype:
    return torch.promote_types(view.hidden.dtype, torch.float32)


def _box(x: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Sum of each cell and the cells around it, ``(B, T H W, D)``; beyond the edges there is nothing."""
    volume = F.pad(x.reshape(x.shape[0], *grid, -1), (0, 0, 1, 1, 1, 1, 1, 1))
    for axis in (1, 2, 3):
        length = volume.shape[axis] - 2
        volume = volume.narrow(axis, 0, length) + volume.narrow(axis, 1, length) + volume.narrow(axis, 2, length)
    return volume.flatten(1, 3)


def _feature_squares(x: Tensor, seats: Tensor) -> Tensor:
    """Squared distances ``(B, N, K)`` of ``x (B, N, D)`` from its rows ``seats (B, K)``, up to rounding."""
    chosen = x.gather(1, seats[..., None].expand(-1, -1, x.shape[-1]))
    return x.square().sum(-1)[:, :, None] + chosen.square().sum(-1)[:, None] - 2 * x @ chosen.transpose(1, 2)


# Pool: average pooling of neighbouring patches, which looks at nothing.


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
        proportional: attention above the merge adds log(size) to the scores of a slot.
    """

    proportional: bool = field(default=True, kw_only=True)  # type: ignore[misc]
    name: ClassVar[str] = "pool"
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
