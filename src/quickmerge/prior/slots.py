"""From tokens and a plan to what the prior reads of each slot: a learned merge of its members, and its geometry."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from quickmerge.tokens.plan import MergePlan
from quickmerge.tokens.view import TokenView

FREQUENCIES = 4
"""Sines and cosines per coordinate of a grid position."""


def group_softmax(logit: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Softmax over the members of each slot: merge weights that sum to one inside every slot.

    Args:
        logit: ``(B, N, H)``, one per token and pooling head.
        slot: ``(B, N)`` long, each token's slot or -1.
        slots: K.

    Returns:
        ``(B, N, H)``, zero for tokens in no slot.
    """
    b, _, h = logit.shape
    member = (slot >= 0)[..., None]
    into = torch.where(slot >= 0, slot, slots)[..., None].expand(-1, -1, h)
    ceiling = logit.new_full((b, slots + 1, h), -torch.inf)
    # The shift changes no weight, so no gradient has to pass through it.
    ceiling = ceiling.scatter_reduce(1, into, logit.detach(), "amax")
    raw = torch.where(member, (logit - ceiling.gather(1, into)).exp(), 0.0)
    total = logit.new_zeros(b, slots + 1, h).scatter_add(1, into, raw)
    weight: Tensor = raw / total.gather(1, into).clamp_min(torch.finfo(logit.dtype).tiny)
    return torch.where(member, weight, 0.0)


def sum_by_slot(value: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Add up each slot's members: ``(B, N, D)`` to ``(B, K, D)``; padding slots are zero."""
    into = torch.where(slot >= 0, slot, slots)[..., None].expand(-1, -1, value.shape[-1])
    out = value.new_zeros(len(value), slots + 1, value.shape[-1]).scatter_add(1, into, value)
    return out[:, :slots]


def cells(view: TokenView, plan: MergePlan) -> Tensor:
    """``(B, K, 3)`` mean place of each slot's members along time, height and width, in cells of ``view.grid``.

    The token at position p stands in the p-th cell; the first is at (0, 0, 0).

    Raises:
        ValueError: if the view has no grid.
    """
    if view.grid is None:
        raise ValueError("grid must be (T, H, W) for a prior of two or three axes, got none")
    place = torch.stack(torch.unravel_index(torch.where(view.valid, view.position, 0), view.grid), -1)
    return plan.merge(place.to(torch.promote_types(view.hidden.dtype, torch.float32)))


def spans(view: TokenView, plan: MergePlan) -> Tensor:
    """``(B, K)`` distance in positions from a slot's first to its last member, plus one; 0 for padding slots."""
    into = torch.where(plan.slot >= 0, plan.slot, plan.slots)
    low = torch.full((len(into), plan.slots + 1), torch.iinfo(torch.long).max, device=into.device)
    first = low.scatter_reduce(1, into, view.position, "amin")[:, : plan.slots]
    last = torch.zeros_like(low).scatter_reduce(1, into, view.position, "amax")[:, : plan.slots]
    return torch.where(plan.valid, last - first + 1, 0)


class SlotEncoder(nn.Module):
    """Slot features: ``u_k = W_a x_k + [sum_{j in G_k} w_hj V_h x_j]_h + geometry(size, span, place)``.

    ``x_k`` is the slot as the plan merges it, and ``w_hj = softmax_{j in G_k}(a_h . x_j)`` are the learned merge
    weights of pooling head h, so that a slot can hold several summaries of its members. Features are normalised
    first: residual streams have a few very large channels.

    Without pooling heads there is only ``W_a x_k`` of features as they are, and geometry: `content` and `place`.

    Args:
        features: D.
        width: of the slot features.
        pool: pooling heads; 0 for none.
        axes: coordinates of a position.
    """

    def __init__(self, features: int, width: int, pool: int, axes: int) -> None:
        super().__init__()
        self.pool, self.axes = pool, axes
        self.norm = nn.RMSNorm(features) if pool else nn.Identity()
        self.anchor = nn.Linear(features, width)
        if pool:
            self.member = nn.Linear(features, width, bias=False)
            self.weight = nn.Linear(features, pool)
        self.geometry = nn.Linear(3 + (2 * FREQUENCIES * axes if axes > 1 else 0), width)
        if pool:
            # The merge begins as the plain mean of a slot's members.
            nn.init.zeros_(self.weight.weight)
            nn.init.zeros_(self.weight.bias)

    def merge(self, x: Tensor, slot: Tensor, slots: int) -> Tensor:
        """The learned merge of normalised members ``x (B, N, D)``: ``(B, K, width)``."""
        weight = group_softmax(self.weight(x), slot, slots)
        value = self.member(x).unflatten(-1, (self.pool, -1))
        return sum_by_slot((value * weight[..., None]).flatten(2), slot, slots)

    def place(self, size: Tensor, span: Tensor, left: Tensor, coordinates: Tensor | None = None) -> Tensor:
        """Geometry features ``(B, K, width)`` of slots.

        Args:
            size, span: ``(B, K)``, in original tokens.
            left: ``(B, K)``, original tokens from the slot to the end of its sequence.
            coordinates: ``(B, K, axes)`` in [0, 1], for grids.
        """
        dtype = self.geometry.weight.dtype
        logs = torch.stack([t.to(dtype).clamp_min(1).log() for t in (size, span, left)], -1)
        if coordinates is not None:
            steps = math.pi * 2.0 ** torch.arange(FREQUENCIES, device=size.device, dtype=dtype)
            angle = (coordinates.to(dtype)[..., None] * steps).flatten(-2)
            logs = torch.cat([logs, angle.sin(), angle.cos()], -1)
        out: Tensor = self.geometry(logs)
        return out

    def content(self, slots: Tensor) -> Tensor:
        """What is read of merged features ``(..., D)``, members apart: ``(..., width)``."""
        out: Tensor = self.anchor(self.norm(slots.to(self.anchor.weight.dtype)))
        return out

    def forward(self, view: TokenView, plan: MergePlan) -> Tensor:
        """``(B, K, width)`` for the tokens and the plan that merged them."""
        dtype = self.anchor.weight.dtype
        x = self.norm(view.hidden.to(dtype))
        merged = self.norm(plan.merge(view.hidden).to(dtype))
        end = torch.where(view.valid, view.position, 0).amax(-1, keepdim=True)
        place = self.place(plan.size, spans(view, plan), end - plan.position + 1)
        out: Tensor = self.anchor(merged) + self.merge(x, plan.slot, plan.slots) + place
        return out
