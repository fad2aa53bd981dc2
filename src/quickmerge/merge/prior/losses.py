"""What a prior is held to: predicting each slot from those before it, and a sequence that has not collapsed."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.calm.heads import VectorHead
from quickmerge.errors import QuickmergeError

COLLAPSED = 0.05
"""A sequence is called collapsed when its slots spread less than this share of what they should."""


class CollapseError(QuickmergeError):
    """The slots of a sequence have become nearly the same, so predicting them means nothing any more."""


def next_slot_loss(head: VectorHead, context: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """The head's score of each slot given what was read before it, per feature.

    ``target`` is detached: with a gradient through the targets a constant sequence would be a perfect score.

    Args:
        head: what predicts.
        context: ``(B, K, width)``, row k made from slots before k only.
        target: ``(B, K, D)``, the slots.
        valid: ``(B, K)`` bool, which of them count.

    Returns:
        The mean over the slots that count, and each slot's own ``(B, K)``, zero where it does not count.
    """
    score = head.loss(context, target.detach()) / target.shape[-1]
    score = torch.where(valid, score, 0.0)
    return score.sum() / valid.sum().clamp_min(1), score


def spread(x: Tensor, valid: Tensor) -> Tensor:
    """How far the slots of each sequence lie from their mean: ``(B,)``, root mean square length."""
    there = valid[..., None].to(x.dtype)
    count = there.sum(1).clamp_min(1)
    centre = (x * there).sum(1) / count
    square = ((x - centre[:, None]) * there).square().sum((1, 2)) / count[:, 0]
    # Below rounding nothing is spread; the small term keeps the root's gradient finite there.
    return (square + torch.finfo(torch.float32).tiny).sqrt()


def relative_spread(x: Tensor, reference: Tensor, valid: Tensor, reference_valid: Tensor) -> Tensor:
    """Mean over the batch of the spread of ``x (B, K, D)`` over that of ``reference (B, N, D)``: 0 when collapsed."""
    return (spread(x, valid) / spread(reference, reference_valid).clamp_min(1e-12)).mean()


def collapse_penalty(share: Tensor, least: float = 0.5) -> Tensor:
    """``relu(least - share)^2``: nothing while slots spread by at least ``least`` of what the tokens do."""
    return torch.relu(least - share).square()


def check_collapse(share: Tensor | float, what: str) -> None:
    """Raise CollapseError, naming what collapsed, if the relative spread is below `COLLAPSED` (or not a number)."""
    value = float(share)
    if not value >= COLLAPSED:
        raise CollapseError(
            f"{what} has collapsed: its slots spread {value:.2g} times as far as the tokens they were merged from, "
            f"at least {COLLAPSED:g} is needed"
        )
