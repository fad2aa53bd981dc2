"""ToMe's rounds of bipartite matching, down to a number of tokens: for all methods that merge or drop by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from quickmerge.merge.reducers.base import Needs, Reducer
from quickmerge.merge.tokens.budget import how_many, known_count
from quickmerge.merge.tokens.plan import MergePlan, bipartite_matching, bipartite_pairs
from quickmerge.merge.tokens.view import Known, TokenView


def mean_key(view: TokenView, who: str) -> Tensor:
    """Keys of the last traced layer averaged over heads, ``(B, N, d)`` in float32 at least and without gradients.

    The view's own where it has them.

    Raises:
        ValueError: if there is no trace to read.
    """
    if view.evidence.key is not None:
        return view.evidence.key.detach().to(torch.promote_types(view.evidence.key.dtype, torch.float32))
    if not view.evidence.attention:
        raise ValueError(f"attention must hold the trace of the layer below for {who}, got none")
    key = view.evidence.attention[-1].key.detach()
    return key.to(torch.promote_types(key.dtype, torch.float32)).mean(1)


def match_down(
    view: TokenView,
    metric: Tensor,
    count: int | Tensor,
    *,
    drop: bool = False,
    share: Tensor | None = None,
    saliency: Tensor | None = None,
    power: float = 1.0,
    kept: Sequence[int] | None = None,
) -> MergePlan:
    """The plan of as many rounds of matching as it takes to leave ``count`` tokens.

    Each round splits the open tokens alternately into two sets, joins every token of the first to its most similar
    one in the second (cosine of ``metric``) and takes the closest pairs. A round halves the open tokens at most, and
    the last open token stays whatever is asked for.

    Args:
        view: the tokens.
        metric: ``(B, N, d)``; a slot has the mean of its members, by ``share``.
        count: tokens to leave; a whole number in a view with a ``prefix``, where shapes alone then decide, or ``(B,)``.
        drop: tokens of the first set vanish instead of merging.
        share: ``(B, N)`` positive, how heavily each token counts in its slot. Default: its size.
        saliency: ``(B, N)`` non-negative. Those go first of the least ``saliency^power (1 - cosine)``, and a slot has
            the sum of its members' saliency. Default: the closest pairs go first.
        power: see ``saliency``.
        kept: ``count`` of each row, where the host knows it.
    """
    share = view.size if share is None else share
    # Values of features don't matter to a plan: from the second round on it's their shape alone that is read.
    total: MergePlan | None = None
    if isinstance(count, Tensor):
        known, kept = _looked_up(view, count, kept)
        side = known.left
    now = view
    while True:
        weight = None if saliency is None else saliency.pow(power)
        if isinstance(count, int):
            step = _by_shape(now, metric, count, drop, share, weight)
        else:
            step = _by_masks(now, metric, count, known, kept or (), drop, share, weight, side)
        if step is None:
            return MergePlan.identity(view) if total is None else total
        total = step if total is None else total.compose(step)
        if isinstance(count, int) and step.slots <= max(count, (view.prefix or 0) + 1):
            return total
        metric = step.merge(metric)
        told: dict[str, Any] = {"prefix": view.prefix}
        if not isinstance(count, int):
            known = known.merged(step.counted().counts or ())
            told = {"valid": step.valid, "protected": step.carry(now.protected), "known": known}
        now = TokenView(view.hidden[:, : step.slots], position=step.position, size=step.size, **told)
        share, saliency = _sums(step, share), None if saliency is None else _sums(step, saliency)


def _by_shape(
    view: TokenView, metric: Tensor, count: int, drop: bool, share: Tensor, weight: Tensor | None
) -> MergePlan | None:
    """One round in a view with a prefix; None if there is nothing to do."""
    n, prefix = metric.shape[1], view.prefix or 0
    remove = min(n - count, (n - prefix) // 2)
    if remove <= 0:
        return None
    source, into, _ = bipartite_pairs(metric, prefix, remove, weight)
    return MergePlan.from_moves(view, source) if drop else MergePlan.from_moves(view, source, into, share)


def _looked_up(view: TokenView, count: Tensor, kept: Sequence[int] | None) -> tuple[Known, Sequence[int]]:
    """What the host must know of a view, and ``count (B,)``, in one look at most."""
    if view.known is not None:
        return view.known, count.tolist() if kept is None else kept
    fixed = (view.protected & view.valid).sum(-1)
    told = torch.stack([view.valid.sum(-1), fixed, view.valid[:, -1].long(), count])
    valid, protected, ends, wanted = told.tolist()
    ends = [view.prefix is None and bool(end) for end in ends]
    return Known(tuple(valid), tuple(protected), (0,) * len(valid), tuple(valid), tuple(ends)), wanted


def _by_masks(
    view: TokenView,
    metric: Tensor,
    count: Tensor,
    known: Known,
    wanted: Sequence[int],
    drop: bool,
    share: Tensor,
    weight: Tensor | None,
    side: bool,
) -> MergePlan | None:
    """One round in any view of which the host knows the numbers; None if there is nothing to do in any row."""
    valid, free = known.valid, [n - p for n, p in zip(known.valid, known.protected, strict=True)]
    # Of the first set, the larger half of the open tokens, all may go if there is anybody in the second.
    most = [(n + 1) // 2 if n > 1 else 0 for n in free]
    goes = [max(0, min(n - c, m)) for n, c, m in zip(valid, wanted, most, strict=True)]
    if not any(goes):
        return None
    excess = (view.valid.sum(-1) - count).clamp_min(0)
    leader = bipartite_matching(metric, view.free, excess, weight, max(free))
    anchor, kept = view.valid & ~(leader >= 0), [n - g for n, g in zip(valid, goes, strict=True)]
    if drop:
        return MergePlan.from_anchors(view, anchor, pads_left=side, kept=kept)
    return MergePlan.from_anchors(view, anchor, leader, share, side, kept)


def _sums(plan: MergePlan, x: Tensor) -> Tensor:
    """What the members of each slot have together: ``(B, N)`` to ``(B, K)``."""
    member = plan.slot >= 0
    return x.new_zeros(plan.size.shape).scatter_add(1, plan.slot.clamp_min(0), torch.where(member, x, 0))


# ToMe: bipartite soft matching, the common baseline of all merging.


@dataclass(frozen=True)
class ToMe(Reducer):
    """Token Merging (arXiv 2210.09461): merge the most similar alternate tokens until the budget is met.

    Each round splits the free tokens alternately into two sets, joins every token of the first to its most similar
    one in the second (cosine, of the last probed layer's keys averaged over heads, as in the paper) and merges the
    closest pairs, weighted by size. A round halves the free tokens at most, so small budgets take several rounds.
    A slot stands where its second-set token stood, and attention above the merge adds log(size).

    Args:
        keep: share of the tokens kept, or a budget.
        proportional: attention above the merge adds log(size) to the scores of a slot, as in the paper; engines that
            have attention of their own can't.
    """

    # A default of the class for others, a setting of each object here.
    proportional: bool = field(default=True, kw_only=True)  # type: ignore[misc]
    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "arXiv 2210.09461"

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(1, visual=frozenset({"key"}))

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        kept = known_count(self.budget, view)
        return match_down(view, mean_key(view, self.name), how_many(self.budget, view), kept=kept)
