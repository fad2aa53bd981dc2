"""Who is a member of which cluster, and the means of the members."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from quickmerge.errors import whole_number

__all__ = [
    "Draws",
    "Groups",
    "centred",
    "group",
    "kmeans",
    "lloyd",
    "means",
    "nearest",
    "nearest_again",
    "pick",
    "remembered",
]


@dataclass(frozen=True)
class Groups:
    """Members of K clusters in each of R problems.

    ``order (R, L)`` long: the L points sorted by cluster, then by place.
    ``members (R, K)`` long: how many points a cluster has.
    ``offset (R, K)`` long: cluster i is ``order[offset_i : offset_i + members_i]``.
    ``count (R, K)`` float64: the sum of the members' weights.
    """

    order: Tensor
    members: Tensor
    offset: Tensor
    count: Tensor


def group(labels: Tensor, clusters: int, weight: Tensor | None = None) -> Groups:
    """Collect the members of ``clusters`` clusters.

    Args:
        labels: ``(R, L)`` long in 0..clusters - 1.
        clusters: K.
        weight: ``(R, L)``, or None: one each.
    """
    none = torch.zeros(len(labels), clusters, dtype=torch.long, device=labels.device)
    members = none.scatter_add(1, labels, torch.ones_like(labels))
    count = members.double()
    if weight is not None:
        count = torch.zeros_like(count).scatter_add_(1, labels, weight.double())
    return Groups(labels.argsort(dim=-1, stable=True), members, members.cumsum(-1) - members, count)


def means(x: Tensor, groups: Groups, weight: Tensor | None = None) -> Tensor:
    """Weighted means of the members: ``x (R, L, D)`` to ``(R, K, D)``, zeros where a cluster weighs nothing.

    Members are summed one after the other in their order, so the result does not depend on what else is computed.
    """
    d = x.shape[-1]
    table, apart = _rows(x)
    problem = torch.arange(len(x), device=x.device)[:, None]
    share = None if weight is None else weight.to(x.dtype).gather(1, groups.order).flatten()
    total = embedding_bag(
        (groups.order + problem * apart).flatten(),
        table,
        (groups.offset + problem * groups.order.shape[1]).flatten(),
        mode="sum",
        per_sample_weights=share,
    ).view(len(x), -1, d)
    count = groups.count[..., None].to(x.dtype)
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """Points ``(R, L, D)`` as rows of a table ``(T, D)``, and how many rows lie from one problem to the next.

    Some columns of a cache are such a table as they are, with other rows in between, and need not be copied.
    """
    r, length, d = x.shape
    if r * length == 0 or x.stride(2) != 1 or x.stride(1) != d or x.stride(0) % d or x.stride(0) < length * d:
        return x.reshape(r * length, d), length
    apart = x.stride(0) // d
    return x.as_strided(((r - 1) * apart + length, d), (d, 1)), apart


# The nearest of K centroids for each of L points, in R problems.


AT_ONCE = {"cpu": 1 << 19, "other": 1 << 24}
"""Distances that live at once: 2 MiB in float32, which a core's cache holds, and 64 MiB on a device."""
ROWS = 2048
"""Points whose centroids are looked up at once, for the same reason."""
WORTHWHILE = 0.7
"""Share of all distances above which it takes no longer to compute them all. Measured."""


def nearest(x: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Compare every point with every centroid.

    Args:
        x: ``(R, L, D)`` points, the better centred the more exact.
        centroids: ``(R, K, D)``.

    Returns:
        ``(R, L)`` long, the nearest centroid (of equally near ones the first), and ``(R, L)``, the square of its
        distance less ``|x|^2``, which is what decides.
    """
    (r, length, _), k = x.shape, centroids.shape[1]
    problems, height = _tile(r, length, k, x.device.type == "cpu")
    # |x - c|^2 = |x|^2 + (|c|^2 - 2 x.c)
    square = centroids.square().sum(-1)[:, None]
    label = torch.empty(r, length, dtype=torch.long, device=x.device)
    least = x.new_empty(r, length)
    room = x.new_empty(problems * height * k)
    for p in range(0, r, problems):
        p1 = min(p + problems, r)
        for i in range(0, length, height):
            i1 = min(i + height, length)
            part = room[: (p1 - p) * (i1 - i) * k].view(p1 - p, i1 - i, k)
            torch.baddbmm(square[p:p1], x[p:p1, i:i1], centroids[p:p1].mT, alpha=-2, out=part)
            least[p:p1, i:i1], label[p:p1, i:i1] = part.min(-1)
    return label, least


def nearest_again(x: Tensor, centroids: Tensor, label: Tensor, least: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest` where it is known before some of the centroids moved: the same result, from fewer distances.

    A centroid that did not move is no nearer than before. So a point whose own centroid stayed or came nearer can only
    go over to one that moved, and only points whose own went away have to be compared with all. Of equally near
    centroids a point keeps its own.

    Args:
        x: ``(R, L, D)``.
        centroids: ``(R, K, D)``, where they are now.
        label: ``(R, L)`` long, the nearest centroid before.
        least: ``(R, L)``, what `nearest` gave for it; where that is not known, ``-inf``.
        moved: ``(R, K)`` bool, the centroids that are not where they were.

    Returns:
        As `nearest`.
    """
    if x.device.type != "cpu":  # how many moved is a number to wait for, and there comparing all is soon done
        return nearest(x, centroids)
    found = [_again(*problem) for problem in zip(x, centroids, label, least, moved, strict=True)]
    return torch.stack([one[0] for one in found]), torch.stack([one[1] for one in found])


def remembered(x: Tensor, centroids: Tensor, label: Tensor, settled: Tensor) -> Tensor:
    """What `nearest` gave for labels that it found some time ago: ``(R, L)``, ``-inf`` where that is not known.

    Args:
        x: ``(R, L, D)``.
        centroids: ``(R, K, D)``.
        label: ``(R, L)`` long.
        settled: ``(R, K)`` bool, the centroids that are where they were then.
    """
    if x.device.type != "cpu":  # nobody will ask, see `nearest_again`
        return torch.full_like(x[..., 0], -torch.inf)
    least = torch.stack([_own(*problem) for problem in zip(x, centroids, label, strict=True)])
    return torch.where(settled.gather(1, label), least, -torch.inf)


def _own(x: Tensor, centroids: Tensor, label: Tensor) -> Tensor:
    """``|c|^2 - 2 x.c`` of each point ``(L, D)`` with the one of ``centroids (K, D)`` that it has: ``(L,)``."""
    square, out = centroids.square().sum(-1), x.new_empty(len(x))
    for i in range(0, len(x), ROWS):
        here = label[i : i + ROWS]
        out[i : i + ROWS] = square[here] - 2 * (x[i : i + ROWS] * centroids.index_select(0, here)).sum(-1)
    return out


def _tile(problems: int, points: int, centroids: int, cpu: bool) -> tuple[int, int]:
    """How many problems, and how many points of each, are compared with all centroids at once."""
    at_once = AT_ONCE["cpu" if cpu else "other"]
    height = max(1, min(points, at_once // centroids))
    # On a CPU one problem after the other: no slower, and the same to the last bit whatever else is in the batch.
    return (1 if cpu else max(1, min(problems, at_once // (height * centroids)))), height


def _again(x: Tensor, centroids: Tensor, label: Tensor, least: Tensor, moved: Tensor) -> tuple[Tensor, Tensor]:
    """One problem: ``x (L, D)``, ``centroids (K, D)``."""
    some = moved.nonzero()[:, 0]
    enough = WORTHWHILE * len(x) * len(centroids)
    if len(some) * len(x) < enough:
        lost = moved[label].nonzero()[:, 0]
        points = x.index_select(0, lost)
        now = _own(points, centroids, label[lost])
        away = (now > least[lost]).nonzero()[:, 0]
        if len(some) * len(x) + len(away) * len(centroids) < enough:
            least = least.index_copy(0, lost, now)
            if len(some):
                new, square = nearest(x[None], centroids[None, some])
                nearer = square[0] < least
                label, least = torch.where(nearer, some[new[0]], label), torch.where(nearer, square[0], least)
            new, square = nearest(points[None, away], centroids[None])
            return label.index_copy(0, lost[away], new[0]), least.index_copy(0, lost[away], square[0])
    new, square = nearest(x[None], centroids[None])
    return new[0], square[0]


# k-means by Lloyd's rounds, for R independent problems at once.


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
