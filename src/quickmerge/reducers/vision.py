"""What methods share that read attention in both directions, as it is in vision transformers."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.tokens.view import TokenView


def sees_all(view: TokenView) -> bool:
    """True for images and video, where every token sees every other one."""
    return view.prefix is not None or view.grid is not None


def voters(view: TokenView, patches: int | Tensor) -> Tensor:
    """The tokens whose attention is read: ``(B, w)`` long, filled up with -1.

    All protected tokens, and of the other ones as many as ``patches`` says (for all rows, or ``(B,)``; at most as many
    as there are), evenly spaced.
    """
    b, n = view.hidden.shape[:2]
    device = view.hidden.device
    if view.prefix is not None and isinstance(patches, int):
        free = n - view.prefix
        wanted = min(patches, free)
        spaced = view.prefix + _spaced(wanted, free, device)
        return torch.cat([torch.arange(view.prefix, device=device), spaced]).expand(b, -1)
    most = torch.as_tensor(patches, device=device).expand(b)
    return torch.cat([_some(view.protected & view.valid, most.new_full((b,), n)), _some(view.free, most)], 1)


def key_bias(view: TokenView, proportional: bool) -> Tensor | None:
    """What the host adds to the scores of each key: ``(B, N)``, log(size) if ``proportional``, -inf for padding."""
    bias = view.size.clamp_min(1).to(torch.float32).log() if proportional else None
    if view.prefix is not None:
        return bias
    return (torch.zeros(view.valid.shape, device=view.valid.device) if bias is None else bias).masked_fill(
        ~view.valid, -torch.inf
    )


def _spaced(wanted: int, there: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(wanted, device=device) + 1) * there // (2 * max(1, wanted))


def _some(mask: Tensor, most: Tensor) -> Tensor:
    """At most ``most (B,)`` marked tokens of each row of ``mask (B, N)``, evenly spaced: ``(B, w)``, -1 for none."""
    count = mask.sum(-1)
    wanted = torch.minimum(count, most)
    index = torch.arange(int(wanted.max()), device=mask.device)
    rank = (2 * index + 1) * count[:, None] // (2 * wanted.clamp_min(1)[:, None])
    rows = mask.long().argsort(dim=-1, descending=True, stable=True).gather(1, rank.clamp_max(mask.shape[1] - 1))
    return torch.where(index < wanted[:, None], rows, -1)
