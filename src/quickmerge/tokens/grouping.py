"""Who merges with whom: the next anchor, or bipartite matching.

Anchor rules return, for every token, the index of the anchor that takes it, or -1 to drop it. A protected token
takes nobody.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quickmerge.tokens.view import TokenView


def next_anchor(view: TokenView, anchor: Tensor) -> Tensor:
    """Each token goes to the next kept token on its right: ``(B, N)`` long, -1 where there is none.

    The groups are intervals that end at their anchor, so a slot never holds anything later than its own position.
    """
    b, n = anchor.shape
    index = torch.arange(n, device=anchor.device).expand(b, n)
    takes = anchor & ~view.protected
    ahead = torch.where(takes, index, n).flip(1).cummin(1).values.flip(1)
    return torch.where(view.valid & (ahead < n), ahead, -1)


def bipartite_matching(metric: Tensor, open_: Tensor, remove: Tensor, weight: Tensor | None = None) -> Tensor:
    """ToMe's matching (arXiv 2210.09461): alternate tokens form two sets, the closest pairs merge.

    Args:
        metric: ``(B, N, D)`` features to compare by cosine.
        open_: ``(B, N)`` bool, tokens that may merge. The sets alternate over these.
        remove: ``(B,)`` how many tokens should disappear; at most as many as the first set holds do.
        weight: ``(B, N)`` non-negative, what it costs to lose a token. Those go first of the least
            ``weight * (1 - cosine)``. Default: all weigh the same.

    Returns:
        ``(B, N)`` long, the index of the partner each removed token merges into, -1 for tokens that stay.
        Ties go to the earlier token.
    """
    b, n, _ = metric.shape
    x = normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    rank = open_.long().cumsum(-1) - 1
    first = open_ & (rank % 2 == 0)
    second = open_ & (rank % 2 == 1)
    # The two sets are packed to the left so that the similarity matrix is N/2 x N/2.
    a, b_ = _pack(first), _pack(second)
    if a.shape[1] == 0 or b_.shape[1] == 0:
        return torch.full((b, n), -1, device=metric.device)
    rows = torch.arange(b, device=metric.device)[:, None]
    similarity = x[rows, a.clamp_min(0)] @ x[rows, b_.clamp_min(0)].transpose(1, 2)
    similarity = similarity.masked_fill((b_ < 0)[:, None], -torch.inf)
    best, partner = similarity.max(-1)
    if weight is not None:
        best = torch.where(best == -torch.inf, best, -weight[rows, a.clamp_min(0)] * (1 - best))
    best = best.masked_fill(a < 0, -torch.inf)
    order = best.argsort(dim=-1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(a.shape[1], device=a.device).expand_as(order))
    limit = torch.minimum(remove, torch.minimum(first.sum(-1), second.any(-1) * n))
    goes = (place < limit[:, None]) & (a >= 0)
    leader = torch.full((b, n + 1), -1, device=metric.device)
    leader.scatter_(1, torch.where(goes, a, n), b_.gather(1, partner))
    return leader[:, :n]


def bipartite_pairs(
    metric: Tensor, prefix: int, remove: int, weight: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe's matching (arXiv 2210.09461) where every token is open but the first ``prefix``: shapes known beforehand.

    As in the paper, the sets alternate over all positions, the even ones against the odd ones, and what is protected
    is in neither.

    Args:
        metric: ``(B, N, D)`` features to compare by cosine; an all-zero one is like nothing.
        prefix: tokens at the start of every row that take no part.
        remove: R, at most half of the others.
        weight: ``(B, N)`` non-negative, what it costs to lose a token. Those go first of the least
            ``weight * (1 - cosine)``. Default: all weigh the same.

    Returns:
        The R tokens that go, their partners, and how alike the pairs are: ``(B, R)`` each, those that go first in
        front, of equal ones the earlier.

    Raises:
        ValueError: if ``remove`` is more than half of the tokens behind the prefix.
    """
    if not 0 <= remove <= (metric.shape[1] - prefix) // 2:
        raise ValueError(f"remove must lie in 0..{(metric.shape[1] - prefix) // 2}, got {remove}")
    x = normalize(metric.to(torch.promote_types(metric.dtype, torch.float32)), dim=-1)
    if remove == 0:  # perhaps with nobody to compare
        nobody = torch.zeros(x.shape[0], 0, dtype=torch.long, device=x.device)
        return nobody, nobody, x.new_zeros(x.shape[0], 0)
    even, odd = prefix + prefix % 2, prefix + 1 - prefix % 2
    best, partner = (x[:, even::2] @ x[:, odd::2].transpose(1, 2)).max(-1)
    rank = best if weight is None else -weight[:, even::2] * (1 - best)
    order = rank.argsort(dim=-1, descending=True, stable=True)[:, :remove]
    return 2 * order + even, 2 * partner.gather(1, order) + odd, best.gather(1, order)


def _pack(mask: Tensor) -> Tensor:
    """Indices of the True entries of each row, left-packed, filled up with -1: ``(B, max count)``."""
    b, n = mask.shape
    width = int(mask.sum(-1).max()) if n else 0
    seat = torch.where(mask, mask.long().cumsum(-1) - 1, width)
    out = torch.full((b, width + 1), -1, dtype=torch.long, device=mask.device)
    index = torch.arange(n, device=mask.device).expand(b, n)
    return out.scatter_(1, seat, index)[:, :width]
