"""The nearest of K centroids for each of L points, in R problems."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["nearest", "nearest_again", "remembered"]

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
