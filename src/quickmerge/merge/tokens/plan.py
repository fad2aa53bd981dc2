"""MergePlan: what a reducer decides. Merging, pruning and both at once are the same object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quickmerge.merge.tokens import view as views
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class MergePlan:
    """Which output slot each of N tokens goes to, with what share; pruning is one member a slot.

    ``slot (B, N)`` long: the output slot of each token, -1 where it was dropped or is padding.
    ``weight (B, N)`` float: the token's share in its slot; the shares of a slot sum to one; 0 where slot is -1.
    ``position (B, K)`` long: the slot's place in the original sequence, rising over the valid slots of a row.
    ``size (B, K)`` long: how many original tokens the slot stands for, 0 for padding slots.
    ``valid (B, K)`` bool: False for slots that only pad a ragged batch.
    ``seat (B, K)`` long, where it is known: the token that each slot is led by. All slots are then valid, and all
    tokens that are in none but lead none are dropped or in ``moved``.
    ``moved (B, R)`` long, where ``seat`` is: the tokens that merged into another one's slot; None for none.
    ``order (B, R)`` long, where tokens were chosen one after another: which, then -1; protected ones are not in it.
    ``counts``: how many slots of each row are valid, where the host knows it without asking the device; else None.
    """

    slot: Tensor
    weight: Tensor
    position: Tensor
    size: Tensor
    valid: Tensor
    seat: Tensor | None = None
    moved: Tensor | None = None
    order: Tensor | None = None
    counts: tuple[int, ...] | None = None

    @classmethod
    def identity(cls, view: TokenView) -> MergePlan:
        """The plan that changes nothing: every token its own slot, padding included."""
        index = torch.arange(view.valid.shape[1], device=view.valid.device).expand_as(view.valid)
        return cls(
            slot=torch.where(view.valid, index, -1),
            weight=view.valid.to(torch.promote_types(view.hidden.dtype, torch.float32)),
            position=view.position,
            size=view.size * view.valid,
            valid=view.valid,
            counts=None if view.known is None else view.known.valid,
        )

    @classmethod
    def from_anchors(
        cls,
        view: TokenView,
        anchor: Tensor,
        leader: Tensor | None = None,
        share: Tensor | None = None,
        pads_left: bool | None = None,
        kept: Sequence[int] | None = None,
    ) -> MergePlan:
        """Build a plan in which every slot is led by one kept token, the anchor.

        Args:
            view: the tokens.
            anchor: ``(B, N)`` bool, the kept tokens; protected tokens are always kept.
            leader: ``(B, N)`` long, for a token that is not kept the index of the anchor it merges into, or -1
                to drop it. A leader must be an anchor and must not be protected. None drops all the rest.
            share: ``(B, N)`` non-negative float, how heavily each token counts in its slot before shares are
                normalised to sum to one. Default: equal shares. An anchor's share must be positive.
            pads_left: on which side padding slots fill a ragged batch. Default: where the tokens are padded.
            kept: how many tokens of each row are kept, for a method that knows it, and that its anchors and leaders are
                lawful: then nobody waits for a device. Default: it is looked up.

        The slot keeps its anchor's position and the slots keep the anchors' order.

        Raises:
            ValueError: if an anchor is padding, or a leader is no free anchor.
        """
        stays = (anchor & view.valid) | (view.protected & view.valid)
        n, count = view.valid.shape[1], stays.sum(-1)
        follows = target = None
        if leader is not None:
            follows, target = view.valid & ~stays & (leader >= 0), leader.clamp(0, n - 1)
        told, left = None if kept is None else tuple(kept), pads_left
        left = view.pads_left if left is None and view.known is not None else left
        if told is None or left is None or views.CHECKS:
            # All that has to be looked up at once, since a device would be waited for with each.
            wrong = [(anchor & ~view.valid).any(), view.valid[:, -1].all()]
            if leader is not None and follows is not None and target is not None:
                wrong.append((follows & ((leader >= n) | ~(stays & ~view.protected).gather(1, target))).any())
            padding, right, lost, rows = _looked_up(wrong, count)
            if padding:
                raise ValueError("anchor must be valid tokens, got padding among them")
            if any(lost):
                raise ValueError("leader must point to kept tokens that are not protected, got another token")
            if told is not None and told != rows:
                raise ValueError(f"kept must be how many tokens are kept, {rows}, got {told}")
            told = rows
            left = (right and view.prefix is None) if left is None else left
        k = max(told)
        shift = k - count if left else torch.zeros_like(count)
        rank = stays.long().cumsum(-1) - 1 + shift[:, None]
        slot = torch.where(stays, rank, -1)
        if follows is not None and target is not None:
            slot = torch.where(follows, slot.gather(1, target), slot)
        member = slot >= 0
        # Shares are as fine as the features they will weigh, and float32 at least.
        dtype = torch.promote_types(view.hidden.dtype, torch.float32)
        raw = (member if share is None else share * member).to(dtype)
        into = slot.clamp_min(0)
        total = raw.new_zeros(slot.shape[0], k).scatter_add_(1, into, raw)
        weight = torch.where(member, raw / total.gather(1, into).clamp_min(torch.finfo(torch.float32).tiny), 0.0)
        zeros = torch.zeros(slot.shape[0], k, dtype=torch.long, device=slot.device)
        # Only the anchor writes its position, so the slot stands exactly where its anchor stood. Everybody else
        # writes to one extra column that is cut off.
        seat = torch.where(stays, rank, k)
        position = zeros.new_zeros(slot.shape[0], k + 1).scatter_(1, seat, view.position)[:, :k]
        size = zeros.scatter_add(1, into, view.size * member)
        valid = zeros.new_zeros(slot.shape[0], k + 1).scatter_(1, seat, 1)[:, :k].bool()
        return cls(slot=slot, weight=weight, position=position, size=size, valid=valid, counts=told)

    @classmethod
    def from_moves(
        cls, view: TokenView, source: Tensor, into: Tensor | None = None, share: Tensor | None = None
    ) -> MergePlan:
        """Build a plan that takes the same number R of tokens out of every row; all shapes are known beforehand.

        Args:
            view: the tokens, with a ``prefix``: all are valid.
            source: ``(B, R)`` long, the tokens that go, each named once and none of the prefix.
            into: ``(B, R)`` long, for each the token it merges into, which stays; None drops them all.
            share: ``(B, N)`` positive, as for `from_anchors`.

        The values are not looked at: that they are lawful is the caller's promise, and `check` tells.
        """
        b, n = source.shape[0], view.hidden.shape[1]
        k = n - source.shape[1]
        stays = torch.ones(b, n, dtype=torch.bool, device=source.device).scatter(1, source, False)
        rank = stays.long().cumsum(-1) - 1
        index = torch.arange(n, device=source.device).expand(b, n)
        seat = torch.zeros(b, k + 1, dtype=torch.long, device=source.device)
        seat = seat.scatter(1, torch.where(stays, rank, k), index)[:, :k]
        size = view.size.gather(1, seat)
        valid = torch.ones(b, k, dtype=torch.bool, device=source.device)
        position = view.position.gather(1, seat)
        slot = torch.where(stays, rank, -1)
        dtype = torch.promote_types(view.hidden.dtype, torch.float32)
        if into is None:
            return cls(slot, stays.to(dtype), position, size, valid, seat)
        target = rank.gather(1, into)
        slot = slot.scatter(1, source, target)
        size = size.scatter_add(1, target, view.size.gather(1, source))
        raw = (torch.ones_like(slot) if share is None else share).to(dtype)
        total = raw.gather(1, seat).scatter_add(1, target, raw.gather(1, source))
        return cls(slot, raw / total.gather(1, slot), position, size, valid, seat, source)

    @property
    def slots(self) -> int:
        """K, the number of output slots of the widest row."""
        return self.position.shape[1]

    def is_identity(self, view: TokenView) -> bool:
        """True when applying the plan to ``view``'s tokens would change nothing at all, padding included."""
        if self.slots != self.slot.shape[1]:
            return False
        index = torch.arange(self.slots, device=self.slot.device)
        return torch.equal(self.slot, torch.where(view.valid, index, -1))

    def merge(self, x: Tensor) -> Tensor:
        """Weighted sum of each slot's members: ``(B, N, ...)`` to ``(B, K, ...)``; padding slots are zero.

        Sums run in float32 at least, so that half precision loses nothing to the order of addition. A slot with
        one member is a copy of it, to the bit.
        """
        work = x.flatten(2) if x.ndim > 2 else x[..., None]
        dtype = torch.promote_types(work.dtype, torch.float32)
        if self.seat is not None:
            return self._merge_moved(work, self.seat, dtype).to(x.dtype).reshape(x.shape[0], self.slots, *x.shape[2:])
        # One extra slot collects the dropped tokens and is cut off.
        into = torch.where(self.slot >= 0, self.slot, self.slots)
        flat = into + torch.arange(into.shape[0], device=into.device)[:, None] * (self.slots + 1)
        out = work.new_zeros(into.shape[0] * (self.slots + 1), work.shape[-1], dtype=dtype)
        out.index_add_(0, flat.flatten(), (work.to(dtype) * self.weight[..., None].to(dtype)).flatten(0, 1))
        out = out.view(into.shape[0], self.slots + 1, -1)[:, : self.slots].to(x.dtype)
        return out.reshape(x.shape[0], self.slots, *x.shape[2:])

    def _merge_moved(self, x: Tensor, seat: Tensor, dtype: torch.dtype) -> Tensor:
        """`merge` where it is known who moved: ``x_a + sum_i w_i (x_i - x_a)`` for the leader a of each slot.

        That is the weighted sum, since the shares of a slot sum to one; only those who go cost more than a copy.
        """
        b, n, flat = x.shape[0], x.shape[1], x.flatten(0, 1)
        row = torch.arange(b, device=x.device)[:, None]
        out = flat.index_select(0, (seat + row * n).flatten()).to(dtype)
        if self.moved is not None:
            into = (self.slot.gather(1, self.moved) + row * self.slots).flatten()
            apart = flat.index_select(0, (self.moved + row * n).flatten()).to(dtype) - out.index_select(0, into)
            share = self.weight.gather(1, self.moved).to(dtype).flatten()
            out.index_add_(0, into, apart * share[:, None])
        return out.view(b, self.slots, -1)

    def unmerge(self, y: Tensor) -> Tensor:
        """Copy each slot back to its members: ``(B, K, ...)`` to ``(B, N, ...)``; dropped tokens become zero."""
        return to_members(y, self.slot)

    def compose(self, then: MergePlan) -> MergePlan:
        """The single plan that equals applying this one and then ``then`` to its slots; it knows of no ``order``."""
        if then.slot.shape[1] != self.slots:
            raise ValueError(f"then must act on {self.slots} tokens, got a plan for {then.slot.shape[1]}")
        slot = follow(self.slot, then.slot)
        weight = torch.where(slot >= 0, self.weight * then.weight.gather(1, self.slot.clamp_min(0)), 0.0)
        seat = moved = None
        # Where both only drop, or both only merge, it is still known who leads and who moved.
        if self.seat is not None and then.seat is not None and (self.moved is None) == (then.moved is None):
            seat = self.seat.gather(1, then.seat)
            if self.moved is not None and then.moved is not None:
                moved = torch.cat([self.moved, self.seat.gather(1, then.moved)], 1)
        return MergePlan(slot, weight, then.position, then.size, then.valid, seat, moved, counts=then.counts)

    def counted(self) -> MergePlan:
        """The same with its ``counts``, for which a device may have to be waited for."""
        return self if self.counts is not None else replace(self, counts=tuple(self.valid.sum(-1).tolist()))

    def carry(self, mask: Tensor) -> Tensor:
        """Which slots hold a marked token: ``(B, N)`` bool to ``(B, K)`` bool."""
        into = self.slot.clamp_min(0)
        return torch.zeros_like(self.size).scatter_add(1, into, (mask & (self.slot >= 0)).long()) > 0

    def check(self, view: TokenView) -> None:
        """Raise ValueError, naming the broken law, unless this is a lawful plan for ``view``.

        The laws: every valid token is in one slot or dropped, padding in none; no slot is empty; shares sum to
        one; sizes are conserved, dropped tokens counted apart; protected tokens stay alone; positions rise.
        """
        member = self.slot >= 0
        if bool((member & ~view.valid).any()) or bool(((self.slot < -1) | (self.slot >= self.slots)).any()):
            raise ValueError("slot: padding may not enter a slot, and slots must lie in 0..K-1")
        into = self.slot.clamp_min(0)
        zeros = torch.zeros(into.shape[0], self.slots, device=into.device)
        crowd = zeros.scatter_add(1, into, member.float())
        if bool(((crowd > 0) != self.valid).any()):
            raise ValueError("valid: a slot is valid exactly when it has a member")
        share = zeros.scatter_add(1, into, self.weight.float() * member)
        if not torch.allclose(share[self.valid], torch.ones_like(share[self.valid]), atol=1e-4):
            raise ValueError("weight: the shares of a slot must sum to one")
        if bool((self.weight < 0).any()) or bool((self.weight[~member] != 0).any()):
            raise ValueError("weight: shares are never negative, and zero for dropped tokens")
        size = torch.zeros_like(self.size).scatter_add(1, into, view.size * member)
        if bool((size != self.size).any()):
            raise ValueError("size: a slot's size must be the sum of its members' sizes")
        if bool((view.protected & view.valid & (~member | (crowd.gather(1, into) != 1))).any()):
            raise ValueError("protected: a protected token must be alone in its slot")
        for row in range(into.shape[0]):
            places = self.position[row][self.valid[row]]
            if bool((places[1:] <= places[:-1]).any()):
                raise ValueError("position: slots must be in rising order of position")


def _looked_up(flags: list[Tensor], count: Tensor) -> tuple[bool, bool, list[bool], tuple[int, ...]]:
    """The flags, the first two apart, and the numbers ``count (B,)``, in one look."""
    first, second, *others = torch.cat([torch.stack(flags).long(), count]).tolist()
    more = len(flags) - 2
    return bool(first), bool(second), [bool(flag) for flag in others[:more]], tuple(others[more:])


def anchors_of(plan: MergePlan, view: TokenView) -> Tensor:
    """``(B, K)`` long: the token of ``view`` at whose place each slot stands; of a padding slot, any."""
    if plan.seat is not None:
        return plan.seat
    last = view.position.shape[1] - 1
    # Positions rise over the valid tokens of a row; padding must not stand in between.
    place = torch.where(view.valid, view.position, torch.where(view.valid.long().cumsum(-1) > 0, 2**62, -1))
    return torch.searchsorted(place.contiguous(), plan.position.contiguous()).clamp_max(last)


def follow(slot: Tensor, then: Tensor) -> Tensor:
    """Where tokens end that went to ``slot (B, N)`` when the slots went to ``then (B, K)``; -1 is dropped."""
    return torch.where(slot >= 0, then.gather(1, slot.clamp_min(0)), -1)


def to_members(y: Tensor, slot: Tensor) -> Tensor:
    """Copy slots ``(B, K, ...)`` to the tokens that are in them, ``slot (B, N)``; zero for those that are in none."""
    index = slot.clamp_min(0)
    while index.ndim < y.ndim:
        index = index[..., None]
    member = (slot >= 0).view(*slot.shape, *[1] * (y.ndim - 2))
    out = y.gather(1, index.expand(-1, -1, *y.shape[2:]))
    return torch.where(member, out, torch.zeros((), dtype=y.dtype, device=y.device))


# Who merges with whom: the next anchor, or bipartite matching.
#
# Anchor rules return, for every token, the index of the anchor that takes it, or -1 to drop it. A protected token
# takes nobody.


def next_anchor(view: TokenView, anchor: Tensor) -> Tensor:
    """Each token goes to the next kept token on its right: ``(B, N)`` long, -1 where there is none.

    The groups are intervals that end at their anchor, so a slot never holds anything later than its own position.
    """
    b, n = anchor.shape
    index = torch.arange(n, device=anchor.device).expand(b, n)
    takes = anchor & ~view.protected
    ahead = torch.where(takes, index, n).flip(1).cummin(1).values.flip(1)
    return torch.where(view.valid & (ahead < n), ahead, -1)


def within_width(view: TokenView, score: Tensor, count: Tensor, width: int) -> Tensor:
    """The anchors of groups of bounded width: ``(B, N)`` bool, ``count (B,)`` in each row.

    The free tokens of a row, in order, are cut into runs, each of which ends at an anchor and has ``width`` tokens at
    most. Anchors are the best-scoring tokens, the last free one, and within what is longer than ``width`` between two
    of these every ``width``-th token to the left of an anchor. Each further best-scoring token makes no or one slot
    more, so that there is a number of them with which ``count`` is met to the token. Where a count allows fewer slots
    than ``width`` takes, groups are twice as wide, and so on.

    Args:
        view: the tokens. Protected ones are anchors, which ``count`` includes.
        score: ``(B, N)``; ties go to the earlier token.
        count: at least the protected tokens and at most the valid ones.
        width: at least 1.
    """
    free = view.free
    b, n = free.shape
    total = free.sum(-1)
    wanted = (count - (view.valid & view.protected).sum(-1)).clamp_min(0)
    order = torch.where(free, score.to(torch.promote_types(score.dtype, torch.float32)), -torch.inf)
    order = order.argsort(dim=-1, descending=True, stable=True)
    # A score may be -inf too: free tokens come first whatever theirs is.
    order = order.gather(1, free.long().gather(1, order).argsort(dim=-1, descending=True, stable=True))
    place = torch.arange(n, device=free.device).expand(b, n)
    rank = torch.empty_like(order).scatter_(1, order, place)
    number = free.long().cumsum(-1)
    last = free & (number == total[:, None])

    def anchors(best: Tensor, wide: Tensor) -> Tensor:
        ends = free & ((rank < best[:, None]) | last)
        ahead = torch.where(ends, number, n).flip(1).cummin(1).values.flip(1)
        return free & ((ahead - number) % wide[:, None] == 0) & (wanted > 0)[:, None]

    wide, none = torch.full_like(total, width), torch.zeros_like(total)
    for _ in range(max(1, n).bit_length()):
        wide = torch.where(anchors(none, wide).sum(-1) > wanted, 2 * wide, wide)
    # The largest number of best tokens that the count has room for.
    low, high = none, wanted
    for _ in range(max(1, n).bit_length()):
        middle = (low + high + 1) // 2
        fits = anchors(middle, wide).sum(-1) <= wanted
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return anchors(low, wide) | (view.valid & view.protected)


def bipartite_matching(
    metric: Tensor, open_: Tensor, remove: Tensor, weight: Tensor | None = None, widest: int | None = None
) -> Tensor:
    """ToMe's matching (arXiv 2210.09461): alternate tokens form two sets, the closest pairs merge.

    Args:
        metric: ``(B, N, D)`` features to compare by cosine.
        open_: ``(B, N)`` bool, tokens that may merge. The sets alternate over these.
        remove: ``(B,)`` how many tokens should disappear; at most as many as the first set holds do.
        weight: ``(B, N)`` non-negative, what it costs to lose a token. Those go first of the least
            ``weight * (1 - cosine)``. Default: all weigh the same.
        widest: how many tokens are open in the row that has the most. Default: it is looked up.

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
    widest = (int(open_.sum(-1).max()) if n else 0) if widest is None else widest
    a, b_ = _pack(first, (widest + 1) // 2), _pack(second, widest // 2)
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


def _pack(mask: Tensor, width: int) -> Tensor:
    """Indices of the True entries of each row, at most ``width``, left-packed, filled up with -1: ``(B, width)``."""
    b, n = mask.shape
    seat = torch.where(mask, mask.long().cumsum(-1) - 1, width)
    out = torch.full((b, width + 1), -1, dtype=torch.long, device=mask.device)
    index = torch.arange(n, device=mask.device).expand(b, n)
    return out.scatter_(1, seat, index)[:, :width]
