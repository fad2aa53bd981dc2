"""GridMerge: QuickMerge++ for patches of images and video, where there is no attention to read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from quickmerge.reducers.base import Reducer
from quickmerge.tokens.budget import select
from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView

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
        cost = (_squares(x, seats) / STEP).round().masked_fill(~takes.gather(1, seats)[:, None], torch.inf)
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


def _squares(x: Tensor, seats: Tensor) -> Tensor:
    """Squared distances ``(B, N, K)`` of ``x (B, N, D)`` from its rows ``seats (B, K)``, up to rounding."""
    chosen = x.gather(1, seats[..., None].expand(-1, -1, x.shape[-1]))
    return x.square().sum(-1)[:, :, None] + chosen.square().sum(-1)[:, None] - 2 * x @ chosen.transpose(1, 2)
