"""Who is a member of which cluster, and the means of the members."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

__all__ = ["Groups", "group", "means"]


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
