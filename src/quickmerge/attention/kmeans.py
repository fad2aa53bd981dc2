"""k-means by Lloyd's rounds, for R independent problems at once."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.attention.members import group, means
from quickmerge.attention.nearest import nearest, nearest_again
from quickmerge.errors import whole_number

__all__ = ["Draws", "centred", "kmeans", "lloyd", "pick"]


class Draws:
    """Which of L points a k-means starts from and falls back on.

    The draws depend on the seed and L alone. So a problem finds the same clusters alone and beside others.

    Args:
        length: L.
        seed: of the draws.
        weight: ``(R, L)``; points of weight 0 are drawn after all others. Default: all weigh the same.
    """

    def __init__(self, length: int, seed: int, weight: Tensor | None = None) -> None:
        self.random = torch.Generator().manual_seed((seed * 0x9E3779B1 + length) % 2**63)
        self.length = length
        order = torch.randperm(length, generator=self.random)[None]
        self.live = torch.full((1, 1), length)
        if weight is not None:
            dead = weight == 0
            self.live = (length - dead.sum(-1, keepdim=True)).clamp_min(1)
            order = order.to(weight.device).expand(weight.shape)
            order = order.gather(1, dead.gather(1, order).byte().argsort(dim=-1, stable=True))
        self.order = order

    def first(self, count: int, like: Tensor) -> Tensor:
        """``(R, count)`` different points, for problems ``like (R, ...)``."""
        return self.order[:, :count].to(like.device).expand(len(like), -1)

    def any(self, count: int, like: Tensor) -> Tensor:
        """``(R, count)`` points, perhaps some of them several times: others at every call."""
        place = torch.randint(2**31, (1, count), generator=self.random).to(self.live.device) % self.live
        return self.order.expand(len(place), -1).gather(1, place).to(like.device).expand(len(like), -1)


def kmeans(
    keys: Tensor,
    clusters: int,
    iterations: int = 10,
    weight: Tensor | None = None,
    seed: int = 0,
    init: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster L points by plain squared Euclidean distance, in R independent problems.

    Each round gives every point to the nearest centroid and makes each centroid the mean of its points; one without
    points starts anew from a point at random, but for the last round. Points are then given away once more, and the
    centroids that are returned are the means of these labels.

    Args:
        keys: ``(R, L, D)``; compared in float32 at least.
        clusters: K. With fewer than K points the last centroids have no members.
        iterations: how many rounds.
        weight: ``(R, L)``, non-negative, what a point counts in a mean. Default: one each.
        seed: of the draws; the same seed draws the same points from every problem of the same length.
        init: ``(R, K)`` long, the points to start from. Default: K different ones, drawn.

    Returns:
        ``(R, L)`` long labels and ``(R, K, D)`` centroids in the precision of the comparison; zeros where there is
        nothing to take the mean of.

    Raises:
        ValueError: if ``clusters`` or ``iterations`` is no whole number of at least 1 or 0.
    """
    clusters = whole_number("clusters", clusters)
    iterations = whole_number("iterations", iterations, 0)
    r, length, d = keys.shape
    x = keys.detach().to(torch.promote_types(keys.dtype, torch.float32))
    if r * length == 0:
        return torch.zeros(r, length, dtype=torch.long, device=x.device), x.new_zeros(r, clusters, d)
    x, middle = centred(x, weight)
    draws = Draws(length, seed, weight)
    start = pick(x, draws.first(min(clusters, length), x) if init is None else init)
    label, _ = lloyd(x, start, iterations, draws, weight)
    groups = group(label, clusters, weight)
    centroids = means(x, groups, weight)
    return label, torch.where(groups.count[..., None] > 0, centroids + middle, 0.0)


def lloyd(
    x: Tensor,
    centroids: Tensor,
    iterations: int,
    draws: Draws,
    weight: Tensor | None = None,
    known: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's rounds from given centroids, and labels at the end.

    Args:
        x: ``(R, L, D)`` in float32 at least, centred.
        centroids: ``(R, K, D)``.
        iterations: how many rounds.
        draws: for clusters that lose all their points.
        weight: ``(R, L)``, or None: one each.
        known: what was nearest before some of the centroids moved, and which: see `nearest_again`.

    Returns:
        ``(R, L)`` long labels, and ``(R, K)`` bool, which clusters have the members that their last centroid was the
        mean of: the labels are nearest with regard to the means of these.
    """
    k = centroids.shape[1]
    if known is None:
        label, least = nearest(x, centroids)
        moved = torch.ones(centroids.shape[:2], dtype=torch.bool, device=x.device)
    else:
        before, least, moved = known
        label, least = nearest_again(x, centroids, before, least, moved)
        moved = _changed(before, label, k)
    for step in range(iterations):
        groups = group(label, k, weight)
        there = groups.count > 0
        centroids = torch.where(there[..., None], means(x, groups, weight), centroids)
        if step < iterations - 1:
            centroids = torch.where(there[..., None], centroids, pick(x, draws.any(k, x)))
            moved = moved | ~there
        before = label
        label, least = nearest_again(x, centroids, before, least, moved)
        moved = _changed(before, label, k)
    return label, ~moved


def centred(x: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """``x (R, L, D)`` less its mean, and the mean ``(R, 1, D)``.

    Distances stay, and are exact to more digits where all points lie far from zero.
    """
    # One by one: threads split a sum over a batch in another way than one over a single problem.
    if weight is None:
        middle = torch.stack([one.mean(0, keepdim=True) for one in x])
    else:
        share = weight.to(x.dtype)
        x = torch.where(share[..., None] > 0, x, 0.0)  # nobody knows what padding holds
        pairs = zip(x, share, strict=True)
        middle = torch.stack([w[None] @ one / w.sum().clamp_min(torch.finfo(x.dtype).tiny) for one, w in pairs])
    return x - middle, middle


def pick(x: Tensor, index: Tensor) -> Tensor:
    """The points ``index (R, K)`` of ``x (R, L, D)``."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def _changed(before: Tensor, after: Tensor, clusters: int) -> Tensor:
    """``(R, K)`` bool: the clusters that gained or lost a member."""
    differ = (before != after).byte()
    none = torch.zeros(len(before), clusters, dtype=torch.uint8, device=before.device)
    return none.scatter_reduce(1, before, differ, "amax").scatter_reduce(1, after, differ, "amax").bool()
