"""The tokens between two blocks of a vision transformer, and the ways back to all of the original ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.tokens.plan import MergePlan, follow


@dataclass
class Level:
    """The tokens that enter a block: what each stands for, and where each original token has gone.

    ``size``, ``position`` and ``valid`` are ``(B, K)``; ``valid`` is None where no slot is padding. ``slot (B, N)`` is
    the place of each original token, -1 where it was dropped; ``alive`` says how many of every row were not dropped,
    None where rows differ, and ``single`` that every slot is known to hold one token. ``bias (B, 1, 1, K)`` is what
    attention adds to the scores, None for nothing.
    """

    size: Tensor
    position: Tensor
    valid: Tensor | None
    slot: Tensor
    alive: int | None
    single: bool
    bias: Tensor | None = None


def after(level: Level | None, plan: MergePlan, *, proportional: bool, dtype: torch.dtype) -> Level:
    """The tokens after ``plan`` was carried out on those of ``level``; None stands for the original ones.

    Args:
        level: what the plan was made for.
        plan: what was decided.
        proportional: whether attention adds log(size) to the scores (ToMe, arXiv 2210.09461, eq. 1).
        dtype: of the bias.
    """
    slot = plan.slot if level is None else follow(level.slot, plan.slot)
    valid = None
    if plan.seat is not None and plan.moved is not None:
        alive = slot.shape[1] if level is None else level.alive
    elif plan.seat is not None and (level is None or level.single):
        alive = plan.slots
    else:  # what was dropped may have been many tokens in one row and one in another: it has to be counted
        counts = (slot >= 0).sum(-1)
        alive = int(counts[0]) if bool((counts == counts[0]).all()) else None
        valid = None if bool(plan.valid.all()) else plan.valid
    single = plan.seat is not None and plan.moved is None and (level is None or level.single)
    bias = None
    if proportional or valid is not None:
        precise = torch.promote_types(dtype, torch.float32)
        bias = (plan.size.clamp_min(1) if proportional else torch.ones_like(plan.size)).to(precise).log()
        if valid is not None:
            bias = bias.masked_fill(~valid, -torch.inf)
        bias = bias.to(dtype)[:, None, None]
    return Level(plan.size, plan.position, valid, slot, alive, single, bias)


def spread(y: Tensor, level: Level, prefix: int) -> Tensor:
    """Give every original token that was not dropped the features of its slot: ``(B, K, D)`` to ``(B, alive, D)``.

    The mean over these is the mean over slots weighted by size, and attention over them is attention with log(size)
    added to the scores, so whatever pools the tokens pools them as it should. Where rows have dropped different
    numbers of tokens, what they dropped is filled with the mean of the patches that they have, those behind the first
    ``prefix`` tokens, which leaves that mean as it is.
    """
    if level.alive == level.slot.shape[1]:
        return _gather(y, level.slot)
    if level.alive is not None:
        first = (level.slot >= 0).long().argsort(dim=-1, descending=True, stable=True)[:, : level.alive]
        return _gather(y, level.slot.gather(1, first))
    there = (level.slot >= 0)[..., None]
    out = torch.where(there, _gather(y, level.slot.clamp_min(0)), 0.0)
    mean = out[:, prefix:].sum(1, keepdim=True) / there[:, prefix:].sum(1, keepdim=True)
    return torch.where(there, out, mean).to(y.dtype)


def full_length(y: Tensor, level: Level) -> Tensor:
    """Every original token with the features of its slot, ``(B, K, D)`` to ``(B, N, D)``; zero where it was dropped."""
    out = _gather(y, level.slot.clamp_min(0))
    return out if level.alive == level.slot.shape[1] else torch.where((level.slot >= 0)[..., None], out, 0.0)


def _gather(y: Tensor, index: Tensor) -> Tensor:
    row = torch.arange(y.shape[0], device=y.device)[:, None] * y.shape[1]
    return y.flatten(0, 1).index_select(0, (index + row).flatten()).view(*index.shape, y.shape[-1])


def rotary(embeddings: tuple[Tensor, ...], level: Level, prefix: int) -> tuple[Tensor, ...]:
    """Rows of rotary tables ``(N, d)`` for the places where the slots stand, ``(B, 1, K, d)``."""
    place = level.position[:, prefix:] - prefix
    return tuple(table[place][:, None] for table in embeddings)


def pick(mask: Tensor, level: Level) -> Tensor:
    """Rows and columns of a bias on the scores ``(B or 1, H or 1, N, N)`` for the places where the slots stand."""
    at = level.position
    b, h, k, n = at.shape[0], mask.shape[1], at.shape[1], mask.shape[-1]
    rows = mask.expand(b, -1, -1, -1).gather(2, at[:, None, :, None].expand(b, h, k, n))
    return rows.gather(3, at[:, None, None].expand(b, h, k, k))
