"""Which clusters a query reads key by key: the ranking, the budget, and the rows to fetch.

Queries are laid out as ``(B, H, q, g, D)``: g query heads share each of H key-value heads, and one selection serves
them. Every shape is known from the shapes of the inputs, nothing is looked up on the device, and so it all compiles.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from quickmerge.multipole.clusters import Clusters

__all__ = [
    "Choice",
    "Weights",
    "capped",
    "choose",
    "gather_index",
    "lookup",
    "mix",
    "per_key",
    "products",
    "rows_at",
    "scores",
]

FEW = 8
"""With fewer query rows than this it is faster to multiply the keys with the queries than the other way round."""


class Weights(NamedTuple):
    """A softmax before it is divided: ``weight (..., w) = exp(logit - top)``, its sum ``total (..., 1)``, and ``top``.

    Where there is nothing, ``weight`` and ``total`` are 0.
    """

    weight: Tensor
    top: Tensor
    total: Tensor


class Choice(NamedTuple):
    """The clusters that are read exactly, for each query and key-value head.

    ``order (B, H, q, k)`` long: the most promising clusters, the best first. ``taken (B, H, q, k)`` bool: which of them
    are chosen. ``rows (B, H, q, k)`` long: members of those, 0 for the others.
    """

    order: Tensor
    taken: Tensor
    rows: Tensor

    def mask(self, clusters: int) -> Tensor:
        """``(B, H, q, clusters)`` bool: who was chosen."""
        none = torch.zeros(*self.order.shape[:-1], clusters, dtype=torch.bool, device=self.order.device)
        return none.scatter(-1, self.order, self.taken)


def products(query: Tensor, key: Tensor) -> Tensor:
    """``(B, H, q, g, w)``: inner products of ``query (B, H, q, g, D)`` with keys of all queries ``(B, H, w, D)``, or
    of each ``(B, H, q, w, D)``."""
    shared = key.dim() == 4
    rows = query.flatten(2, 3) if shared else query
    a, b = rows.flatten(0, -3), key.to(query.dtype).flatten(0, -3)
    if a.shape[1] < FEW:
        out = torch.bmm(b, a.transpose(1, 2)).transpose(1, 2).contiguous()
    else:
        out = torch.bmm(a, b.transpose(1, 2))
    return out.view(*query.shape[:-1], key.shape[-2])


def mix(weight: Tensor, value: Tensor) -> Tensor:
    """``(B, H, q, g, Dv)``: sums of ``value (B, H, w, Dv)`` or ``(B, H, q, w, Dv)`` by ``weight (B, H, q, g, w)``."""
    rows = weight.flatten(2, 3) if value.dim() == 4 else weight
    out = torch.bmm(rows.flatten(0, -3), value.to(weight.dtype).flatten(0, -3))
    return out.view(*weight.shape[:-1], value.shape[-1])


def weigh(logits: Tensor) -> Weights:
    """The weights of a softmax over the last dimension; -inf marks what is not there."""
    top = logits.amax(-1, keepdim=True).clamp_min(torch.finfo(logits.dtype).min)
    weight = (logits - top).exp()
    return Weights(weight, top, weight.sum(-1, keepdim=True))


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits that a model bounds by ``c tanh(x / c)`` in front of its softmax, as Gemma 2 does; None: as they are."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def centroid_logits(query: Tensor, key: Tensor, spread: Tensor | None = None, softcap: float | None = None) -> Tensor:
    """``z (B, H, q, g, C)``, the logit of a key that lies at its cluster's centroid: ``z_i = f(q . c_i)``.

    f is what `capped` does, the identity without ``softcap``. With a spread z is ``f(x) + (f'(x)^2 + f''(x)) v / 2`` at
    ``x = q . c_i``, with ``v = |q|^2 r_i / D``: to second order, the logarithm of the mean of ``exp(f(q . k))`` over
    members that lie about their centroid with mean squared distance ``r_i``, alike in all D directions.

    Args:
        query: ``(B, H, q, g, D)``, scaled.
        key: ``(B, H, C, D)`` centroids, or ``(B, H, q, C, D)``, some for each query.
        spread: r, ``(B, H, C)`` or ``(B, H, q, C)``. Default: no correction.
        softcap: c. Default: none.
    """
    x = products(query, key)
    z = capped(x, softcap)
    if spread is None:
        return z
    half = query.square().sum(-1, keepdim=True) * (_beside_logits(spread, z) / (2 * query.shape[-1]))
    if softcap is not None:
        t = z / softcap
        slope = 1 - t.square()
        half = half * (slope.square() - 2 / softcap * t * slope)
    return z + half


def lookup(
    query: Tensor, key: Tensor, count: Tensor, spread: Tensor | None = None, softcap: float | None = None
) -> Weights:
    """How much each cluster weighs by its centroid, ``N_i exp(z_i)``: weights of shape ``(B, H, q, g, C)``.

    Args:
        query, key, spread, softcap: see `centroid_logits`.
        count: N, ``(B, H, C)`` or ``(B, H, q, C)``; 0 for no cluster.
    """
    z = centroid_logits(query, key, spread, softcap)
    return weigh(z + _beside_logits(count, z).log())


def per_key(found: Weights, count: Tensor, total: Tensor | None = None) -> Tensor:
    """Probability that one key of each cluster gets, by centroids alone: ``S (B, H, q, C)``.

    The softmax is taken for each query head, ``exp(z_i) / sum_j N_j exp(z_j)``, and then its mean over the g heads that
    share a key-value head: the paper's sum (arXiv 2506.13059, section 3) divided by g, so that ``sum_i N_i S_i = 1``.

    Args:
        found: weights ``(B, H, q, g, C)``.
        count: N, ``(B, H, C)`` or ``(B, H, q, C)``.
        total: ``(B, H, q, g, 1)`` the denominator, if it holds more than ``found``.
    """
    total = found.total if total is None else total
    tiny = torch.finfo(total.dtype).tiny
    share = (found.weight / total.clamp_min(tiny)).mean(-2)
    count = _beside(count, share).to(share.dtype)
    return share / torch.where(count > 0, count, 1.0)


def scores(
    query: Tensor, clusters: Clusters, scaling: float | None = None, variance: bool = False
) -> tuple[Tensor, Tensor]:
    """Logits of the centroids and the probability of a key of each cluster.

    Args:
        query: ``(B, Hq, q, D)``, as it is compared with centroids.
        clusters: of one layer.
        scaling: of inner products. Default: ``1 / sqrt(D)``.
        variance: correct for the spread of the members, see `lookup`.

    Returns:
        ``z (B, Hq, q, C)`` without log N, -inf where there is no cluster, and ``S (B, H, q, C)``, see `per_key`.

    Raises:
        ValueError: if ``variance`` is asked for and the clusters don't know their spread.
    """
    rows = layout(query, clusters.key.shape[1], scaling)
    spread = spread_of(clusters, variance)
    z = centroid_logits(rows, clusters.key, spread)
    z = torch.where(_beside_logits(clusters.count, z) > 0, z, -torch.inf)
    found = lookup(rows, clusters.key, clusters.count, spread)
    return z.transpose(2, 3).flatten(1, 2), per_key(found, clusters.count)


def layout(query: Tensor, heads: int, scaling: float | None = None) -> Tensor:
    """Queries ``(B, Hq, q, D)`` by the key-value head they read: ``(B, H, q, g, D)``, scaled, in float32 at least."""
    precise = query.to(torch.promote_types(query.dtype, torch.float32))
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    b, _, q, d = query.shape
    return (precise * scaling).reshape(b, heads, -1, q, d).transpose(2, 3)


def spread_of(clusters: Clusters, variance: bool) -> Tensor | None:
    """What `lookup` takes as spread."""
    if variance and clusters.spread is None:
        raise ValueError("variance must be False for clusters that were made without their spread, got True")
    return clusters.spread if variance else None


def choose(
    share: Tensor, members: Tensor, count: Tensor, budget: int, select: str = "budget", top_p: float = 1.0
) -> Choice:
    """The clusters to read exactly: in falling order of ``share`` as many as have at most ``budget`` members together.

    The first that does not fit ends the choice, whatever comes after it. Equal shares (in float32) go to the earlier
    cluster. Clusters without members or without weight are never chosen; so with a budget of all members, all others
    are. With ``select="top_p"`` the choice also ends with the cluster that brings the probability ``N_i S_i`` of those
    chosen to ``top_p`` (arXiv 2602.05191); 1 is never reached before the last.

    Args:
        share: S, ``(B, H, q, C)``, not negative; see `per_key`.
        members: ``(B, H, C)`` rows to read, or ``(B, H, q, C)``.
        count: N, tokens that these stand for, shaped alike.
        budget: most rows for each query and key-value head.
        select: ``"budget"`` or ``"top_p"``.
        top_p: the probability to reach.
    """
    last = share.shape[-1] - 1
    members, count = (_beside(x, share).expand_as(share) for x in (members, count))
    there = (members > 0) & (count > 0)
    # Floats that are not negative sort as their bits do. With the index in the low half no two are equal, and the order
    # is the same whatever the algorithm; the whole numbers are also sorted faster.
    bits = torch.where(there, share, -1.0).float().view(torch.int32).long()
    ranked = (bits << 32) | torch.arange(last, -1, -1, device=share.device)
    order = last - (ranked.topk(min(budget, last + 1)).values & 0xFFFFFFFF)
    rows = members.gather(-1, order).long()
    taken = there.gather(-1, order) & (rows.cumsum(-1) <= budget)
    if select == "top_p" and top_p < 1:
        mass = share.gather(-1, order) * count.gather(-1, order).to(share.dtype)
        taken = taken & (mass.cumsum(-1) - mass < top_p)
    return Choice(order, taken, torch.where(taken, rows, 0))


def gather_index(order: Tensor, offset: Tensor, choice: Choice, width: int) -> tuple[Tensor, Tensor]:
    """The members of the chosen clusters, side by side.

    Args:
        order: ``(B, H, M)`` members sorted by cluster, see `quickmerge.multipole.Clusters`.
        offset: ``(B, H, C)`` where each cluster begins there, or ``(B, H, q, C)``.
        choice: which clusters.
        width: places; at least as many as there are members to read.

    Returns:
        ``index (B, H, q, width)`` long, entries of ``order``, and ``valid (B, H, q, width)`` bool, which of them count.
    """
    end = choice.rows.cumsum(-1)
    place = torch.arange(width, device=end.device).expand(*end.shape[:-1], width).contiguous()
    which = torch.searchsorted(end, place, right=True).clamp_max(end.shape[-1] - 1)
    offset = offset.unsqueeze(2) if offset.dim() == 3 else offset
    begin = offset.expand(*choice.order.shape[:3], -1).gather(-1, choice.order) - (end - choice.rows)
    at = (begin.gather(-1, which) + place).clamp_max(order.shape[-1] - 1)
    index = order.gather(-1, at.flatten(2)).view_as(at)
    return index.long(), place < end[..., -1:]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """``(B, H, ..., D)``: rows ``index (B, H, ...)`` of ``x (B, H, n, D)``.

    Whatever the strides of ``x``, its rows are read as one list of rows if they are whole rows apart. That is many
    times faster than `torch.gather`, and copies nothing else.
    """
    b, h, n, d = x.shape
    batch = torch.arange(b, device=x.device).view(-1, *[1] * (index.dim() - 1))
    head = torch.arange(h, device=x.device).view(-1, *[1] * (index.dim() - 2))
    steps = x.stride()
    if d == 0 or n == 0 or steps[3] != 1 or any(s % d for s in steps[:3]):
        return x[batch, head, index]
    sb, sh, sn = (s // d for s in steps[:3])
    flat = x.as_strided(((b - 1) * sb + (h - 1) * sh + (n - 1) * sn + 1, d), (d, 1))
    return flat.index_select(0, (index * sn + (batch * sb + head * sh)).flatten()).view(*index.shape, d)


def _beside(per_cluster: Tensor, share: Tensor) -> Tensor:
    """``(B, H, C)`` as ``(B, H, 1, C)``, beside ``share (B, H, q, C)``."""
    return per_cluster.unsqueeze(2) if per_cluster.dim() < share.dim() else per_cluster


def _beside_logits(per_cluster: Tensor, z: Tensor) -> Tensor:
    """``(B, H, C)`` or ``(B, H, q, C)`` as it stands beside logits ``(B, H, q, g, C)``, in their precision."""
    wide = per_cluster[:, :, None] if per_cluster.dim() == 3 else per_cluster
    return wide[:, :, :, None].to(z.dtype)
