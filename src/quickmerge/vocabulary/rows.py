"""The new matrices, put together row by row from what the plan says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from quickmerge.vocabulary.plan import Plan

__all__ = ["Side", "assemble", "usual_bias"]

Side = Literal["input", "output", "bias"]
PART = 8192


def assemble(plan: Plan, base: Tensor, made: Tensor, side: Side, *, put_aside: Tensor | None = None) -> Tensor:
    """One new matrix.

    A special token that stands for several of the base is read as the mean of their rows, brought to the length that
    they have on average (a mean is shorter than what it is of), and predicted as the first of them. A row that is for
    nobody is the mean row: its logit is the mean of the logits of the tokens in use, so greedy decoding never takes it
    and sampling takes it with a probability of at most one in as many (the mean of logits is below the logarithm of
    their mean exponential). A row of zeros promises neither: its logit is 0, which wins where all others are negative.

    Args:
        plan: where each row comes from.
        base: ``(V, d)``, the base's matrix, or ``(V,)``, its bias.
        made: ``(T, d)``, what ``plan.rebuilt`` gets, in that order.
        side: which of the three it is. A tied matrix counts as input.
        put_aside: ``(R, d)``, what ``plan.restored`` gets, in that order.

    Returns:
        ``(plan.size, d)`` in the dtype of ``base``; rows that are copied have the same bits.
    """
    import torch

    flat = base.dim() == 1
    matrix = base[:, None] if flat else base
    new = torch.zeros(plan.size, matrix.shape[1], dtype=matrix.dtype)
    copied = torch.from_numpy(plan.copied)
    new[copied[:, 0]] = matrix[copied[:, 1]]
    if len(plan.rebuilt):
        new[torch.from_numpy(plan.rebuilt)] = made.reshape(len(plan.rebuilt), -1).to(matrix.dtype)
    if len(plan.restored):
        assert put_aside is not None
        new[torch.from_numpy(plan.restored)] = put_aside.reshape(len(plan.restored), -1).to(matrix.dtype)
    special = {own: ids for own, ids in plan.special.items() if side == "input" or own not in plan.rivals}
    for own, ids in special.items():
        new[own] = matrix[ids[0]] if len(ids) == 1 or side != "input" else _joined(matrix[list(ids)]).to(matrix.dtype)
    used = np.concatenate([plan.copied[:, 0], np.asarray(list(special), np.int64), plan.rebuilt, plan.restored])
    empty = np.setdiff1d(np.arange(plan.size), used)
    if len(empty):
        new[torch.from_numpy(empty)] = _mean(new, torch.from_numpy(used)).to(matrix.dtype)
    return new[:, 0] if flat else new


def usual_bias(plan: Plan, base: Tensor) -> Tensor:
    """``(T,)``, what ``plan.rebuilt`` gets of a bias ``(V,)``: the mean of shared tokens, since nothing predicts it."""
    import torch

    known = base[torch.from_numpy(np.unique(plan.copied[:, 1]))].double().mean()
    return known.expand(len(plan.rebuilt))


def _mean(rows: Tensor, used: Tensor) -> Tensor:
    import torch

    # in parts: a whole matrix in float64 would be four times a large vocabulary's own
    total = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    for start in range(0, len(used), PART):
        total += rows[used[start : start + PART]].double().sum(0)
    return total / len(used)


def _joined(rows: Tensor) -> Tensor:
    wide = rows.double()
    mean = wide.mean(0)
    length = mean.norm()
    return mean if not length else mean * (wide.norm(dim=-1).mean() / length)
