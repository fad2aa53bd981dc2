"""Choosing K of N tokens together rather than one by one: greedy coverage and greedy dispersion.

How many are chosen is known beforehand, no value is looked up (but for ``lazy``), and so both compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from quickmerge.errors import whole_number
from quickmerge.merge.tokens.budget import Budget, fixed_count, known_count, lowest, select
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.view import TokenView

OBJECTIVES = ("sum", "min")
PIECE = 1024  # similarities of this many tokens, each at most 2^20, have a sum that fits into int32
AT_ONCE = 32  # bounds that lazy evaluation renews together: less overhead than one by one, and few in vain
GRAM_PAYS = 7  # measured: with more picks than N / 7 it is faster to compare all pairs once than picks one by one


@dataclass(frozen=True)
class Selection:
    """The chosen tokens of each row.

    ``order (B, K)`` long: in the order in which they were chosen, -1 behind the last one of a row that has fewer.
    ``tokens``: N, how many there were to choose from.
    """

    order: Tensor
    tokens: int

    @property
    def index(self) -> Tensor:
        """``(B, K)`` long: the chosen tokens in the order in which they stand, then -1."""
        index = torch.where(self.order < 0, self.tokens, self.order).sort(-1).values
        return torch.where(index < self.tokens, index, -1)

    @property
    def mask(self) -> Tensor:
        """``(B, N)`` bool: who was chosen."""
        none = torch.zeros(self.order.shape[0], self.tokens + 1, dtype=torch.bool, device=self.order.device)
        return none.scatter(1, torch.where(self.order < 0, self.tokens, self.order), True)[:, : self.tokens]


def cover(
    x: Tensor,
    count: int | Tensor,
    saliency: Tensor | None = None,
    alpha: float = 1.0,
    open_: Tensor | None = None,
    lazy: bool = False,
    most: int | None = None,
) -> Selection:
    """Choose salient tokens that cover the others, greedily (SCOPE, arXiv 2510.24214).

    With ``S_ij = max(0, cos(x_i, x_j))`` and ``c_i = max_{j chosen} S_ij`` (0 at first), each step takes the token of
    the largest ``a_j^alpha sum_i max(0, S_ij - c_i)``. Without a saliency that is the greedy of facility location,
    which reaches at least 1 - 1/e of the best ``sum_i c_i``.

    Similarities are rounded to whole multiples of 2^-20 (2^-40 in float64), about as fine as they are exact. Sums of
    whole numbers are exact in any order, so gains never grow from one step to the next, not even by rounding, and
    evaluating them lazily gives the same order to the last token. Ties go to the earlier token. An all-zero token is
    like nothing, itself included.

    Memory is 8 N^2 bytes for each row, half of it only in between, and as much again to evaluate a step unless
    ``lazy``: N = 3000 takes 36 + 36 MB.

    Args:
        x: ``(B, N, D)`` features, compared in float32 at least.
        count: K for all rows, or ``(B,)``; rows with fewer open tokens give what they have.
        saliency: ``(B, N)`` finite, non-negative; its scale does not matter, and where it is zero throughout a row it
            does not count. Default: all the same.
        alpha: how much saliency counts, of at least 0.
        open_: ``(B, N)`` bool, the tokens that can be chosen and want to be covered. Default: all.
        lazy: evaluate gains only while they can still be the largest (Minoux, 1978): the same result, much sooner
            where N is in the thousands, but values are looked up row by row.
        most: the most tokens that any row gives, where that is known; None has it looked up.

    Raises:
        ValueError: if ``count`` is negative or no whole number, or ``alpha`` is negative.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha must be a number of at least 0, got {alpha!r}")
    steps, limit = _limits(x, count, open_, most)
    x, free = unit(x, open_), _all_open(x, open_)
    weight = _weight(saliency, alpha, free)
    if steps == 0:
        order = torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device)
    elif lazy:
        rows = zip(x, weight, free, limit.tolist(), strict=True)
        order = torch.stack([_lazy(similarity(a), b, c, steps, int(most)) for a, b, c, most in rows])
    else:
        order = _greedy(similarity(x), weight, free, steps)
    return Selection(_cut(order, limit), x.shape[1])


def disperse(
    x: Tensor, count: int | Tensor, open_: Tensor | None = None, objective: str = "sum", most: int | None = None
) -> Selection:
    """Choose tokens that are unlike one another, greedily.

    The first is the one of the least mean cosine with all open tokens, itself included. Each next one has the least
    sum of cosines with those chosen (``"sum"``: max-sum dispersion), or the least largest one (``"min"``: max-min
    dispersion, by the farthest point). Ties go to the earlier token. An all-zero token has cosine 0 with every other.

    All pairs are compared at once where many are chosen, with 4 N^2 bytes a row in float32; otherwise each choice with
    all tokens, with 4 N.

    Args:
        x: ``(B, N, D)`` features, compared in float32 at least.
        count: K for all rows, or ``(B,)``; rows with fewer open tokens give what they have.
        open_: ``(B, N)`` bool, the tokens that can be chosen. Default: all.
        objective: ``"sum"`` or ``"min"``.
        most: the most tokens that any row gives, where that is known; None has it looked up.

    Raises:
        ValueError: if ``count`` is negative or no whole number, or for another objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    steps, limit = _limits(x, count, open_, most)
    x, free = unit(x, open_), _all_open(x, open_)
    gram = x @ x.transpose(1, 2) if steps * GRAM_PAYS > x.shape[1] else None
    rows = torch.arange(x.shape[0], device=x.device)
    # sum_j cos(x_i, x_j) = x_i . sum_j x_j, where tokens that are not open are zero
    near = (x @ x.sum(1)[..., None])[..., 0]
    order = []
    for step in range(steps):
        pick = torch.where(free, near, torch.inf).argmin(-1)
        free = free.scatter(1, pick[:, None], False)
        order.append(pick)
        row = gram[rows, pick] if gram is not None else (x @ x[rows, pick][..., None])[..., 0]
        if step == 0:
            near = row
        else:
            near = near + row if objective == "sum" else torch.maximum(near, row)
    chosen = torch.stack(order, 1) if order else torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device)
    return Selection(_cut(chosen, limit), x.shape[1])


def keeps_everything(view: TokenView, count: Tensor, kept: Sequence[int] | None) -> bool:
    """Whether a budget leaves every row as it is: ``count (B,)``, on the host as ``kept`` where it is known."""
    if kept is None or view.known is None:
        return bool((count >= view.valid.sum(-1)).all())
    return all(some >= there for some, there in zip(kept, view.known.valid, strict=True))


def most_chosen(view: TokenView, kept: Sequence[int] | None) -> int | None:
    """The most tokens that are chosen in any row beside its protected ones, where the host knows it."""
    if kept is None or view.known is None:
        return None
    return max(max(0, some - fixed) for some, fixed in zip(kept, view.known.protected, strict=True))


def keep_only(
    view: TokenView, chosen: Selection, left: int | None = None, kept: Sequence[int] | None = None
) -> MergePlan:
    """The plan that keeps the chosen and the protected tokens, drops the rest, and knows the order of the choice.

    With ``left``, how many are kept of every row of a view with a ``prefix``, prefix and all, the choice is among the
    tokens behind the prefix, and nothing is looked up.
    """
    if left is None or view.prefix is None:
        plan = MergePlan.from_anchors(view, chosen.mask & view.valid, kept=kept)
        return replace(plan, order=chosen.order)
    p = view.prefix
    gone = (~chosen.mask).long().argsort(dim=-1, descending=True, stable=True)
    plan = MergePlan.from_moves(view, gone[:, : p + chosen.tokens - left] + p)
    return replace(plan, order=torch.where(chosen.order < 0, -1, chosen.order + p))


def unit(x: Tensor, open_: Tensor | None = None) -> Tensor:
    """``(B, N, D)`` in float32 at least, without gradients: each token of length 1, or 0 if it is zero or not open."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    if open_ is not None:
        x = torch.where(open_[..., None], x, 0.0)
    # The largest entry becomes 1 first, so that no square overflows or vanishes.
    largest = x.abs().amax(-1, keepdim=True)
    return normalize(x / torch.where(largest > 0, largest, 1.0), dim=-1)


def similarity(x: Tensor) -> Tensor:
    """Cosines of ``x (..., N, D)`` of length 1, floored at 0: ``(..., N, N)`` in whole units of 2^-20 (2^-40)."""
    bits, whole = (40, torch.int64) if x.dtype == torch.float64 else (20, torch.int32)
    return (x @ x.transpose(-1, -2)).clamp_(0, 1).mul_(2.0**bits).round_().to(whole)


def _gain(similar: Tensor, covered: Tensor) -> Tensor:
    """``sum_i max(0, S_ji - c_i)`` of rows ``S (..., N)`` over ``c (..., N)``: int64."""
    total = -covered.sum(-1)
    for start in range(0, similar.shape[-1], PIECE):
        most = torch.maximum(similar[..., start : start + PIECE], covered[..., start : start + PIECE])
        total = total + most.sum(-1, dtype=similar.dtype).long()
    return total


def _greedy(similar: Tensor, weight: Tensor, free: Tensor, steps: int) -> Tensor:
    """``(B, steps)``: every gain in every step."""
    rows = torch.arange(similar.shape[0], device=similar.device)
    covered, order = torch.zeros_like(similar[:, 0]), []
    for _ in range(steps):
        score = _gain(similar, covered[:, None]).double() * weight
        pick = torch.where(free, score, -1.0).argmax(-1)
        free = free.scatter(1, pick[:, None], False)
        covered = torch.maximum(covered, similar[rows, pick])
        order.append(pick)
    return torch.stack(order, 1)


def _lazy(similar: Tensor, weight: Tensor, free: Tensor, steps: int, most: int) -> Tensor:
    """``(steps,)`` of one row, of which ``most`` count: a score once computed bounds all later ones of its token.

    In numpy, since each of the many small steps costs torch several times what it computes.
    """
    like, heavy = similar.cpu().numpy(), weight.cpu().numpy()
    covered = np.zeros_like(like[0])
    bound = np.where(free.cpu().numpy(), like.sum(-1, dtype=np.int64) * heavy, -1.0)
    computed = np.zeros(len(bound), dtype=np.int64)
    order = torch.full((steps,), -1)
    at_once = min(AT_ONCE, len(bound))
    for step in range(most):
        # The best bound that is no bound but a score is the answer; an equal one further on could only be a tie.
        while computed[best := int(bound.argmax())] != step:
            renew = np.argpartition(bound, -at_once)[-at_once:]
            renew[0] = best  # the least of them, or of equal bounds another one
            gain = np.maximum(like[renew], covered).sum(-1, dtype=np.int64) - covered.sum(dtype=np.int64)
            bound[renew] = np.where(bound[renew] < 0, -1.0, gain * heavy[renew])
            computed[renew] = step
        order[step], bound[best] = best, -1.0
        np.maximum(covered, like[best], out=covered)
    return order.to(similar.device)


def _weight(saliency: Tensor | None, alpha: float, free: Tensor) -> Tensor:
    """``a^alpha (B, N)`` in float64, relative to the largest of the row so that no power of it vanishes throughout."""
    if saliency is None or alpha == 0:
        return torch.ones(free.shape, dtype=torch.float64, device=free.device)
    a = torch.where(free, saliency.detach().double(), 0.0)
    largest = a.max(-1, keepdim=True).values if a.shape[1] else a.new_ones(a.shape[0], 1)
    return torch.where(largest > 0, a / torch.where(largest > 0, largest, 1.0), 1.0).pow(alpha)


def _all_open(x: Tensor, open_: Tensor | None) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if open_ is None else open_


def _limits(x: Tensor, count: int | Tensor, open_: Tensor | None, most: int | None = None) -> tuple[int, Tensor]:
    """How many steps there are, ``most`` if that is known, and after how many each row ``(B,)`` is done."""
    n = x.shape[1]
    there = torch.full(x.shape[:1], n, device=x.device) if open_ is None else open_.sum(-1)
    if isinstance(count, Tensor):
        limit = torch.minimum(count.clamp_min(0), there)
        return int(limit.max()) if most is None else most, limit
    count = whole_number("count", count, 0)
    return min(count, n), there.clamp_max(count)


def _cut(order: Tensor, limit: Tensor) -> Tensor:
    return torch.where(torch.arange(order.shape[1], device=order.device) < limit[:, None], order, -1)


def keep_best(view: TokenView, budget: Budget, score: Tensor, saliency: Tensor | None = None) -> MergePlan:
    """The plan that keeps the highest-scoring tokens and drops the rest; protected tokens are always kept.

    Where shapes alone say how many that are, nothing is looked at, so that the plan compiles; else masks decide.

    Args:
        view: the tokens.
        budget: how many of them are kept.
        score: ``(B, N)``, higher is kept; padding may hold anything finite.
        saliency: ``(B, N)``, what the budget goes by. Default: the score.
    """
    count = fixed_count(budget, view)
    if count is not None and view.prefix is not None:
        return MergePlan.from_moves(view, lowest(score, view.hidden.shape[1] - count, view.prefix))
    counts = budget.count(view, score if saliency is None else saliency)
    return MergePlan.from_anchors(view, select(score, counts, view), kept=known_count(budget, view))
