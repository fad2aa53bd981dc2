"""Several items packed behind one shared prefix: what each token may see, and where each stands.

Labels of an image (arXiv 2312.02142, Eq. 6), candidate labels of a closed set, or questions about one image: each
item is read as if it alone stood behind the prefix.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["additive", "packed_mask", "packed_positions"]


def packed_mask(
    group: Tensor,
    image: Tensor,
    valid: Tensor | None = None,
    *,
    independent: bool = True,
    bidirectional: bool = True,
) -> Tensor:
    """What sees what: ``(B, 1, N, N)`` bool, True where the query of the row may see the key of the column.

    ``visible(i, j) = (j <= i and (g(j) = 0 or g(j) = g(i))) or (image(i) and image(j))`` over valid keys j; padding
    sees itself alone, so that no softmax is over nothing.

    Args:
        group: ``(B, N)`` long, 0 for the shared prefix, k >= 1 for the k-th packed item.
        image: ``(B, N)`` bool, tokens of the image.
        valid: ``(B, N)`` bool, False for padding. Default: all.
        independent: False lets items see those before them, as in one plain sequence.
        bidirectional: False leaves the image causal.

    Raises:
        ValueError: if the shapes do not agree.
    """
    valid = _checked(group, valid, image)
    index = torch.arange(group.shape[1], device=group.device)
    see = (index[None, :] <= index[:, None])[None]
    if independent:
        key, query = group[:, None, :], group[:, :, None]
        see = see & ((key == 0) | (key == query))
    if bidirectional:
        see = see | (image[:, None, :] & image[:, :, None])
    see = see & valid[:, None, :] & valid[:, :, None]
    return (see | (index[None, :] == index[:, None]))[:, None]


def packed_positions(group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Where each token stands, ``(B, N)`` long: every item starts right behind the prefix; padding is at 0.

    Args:
        group: ``(B, N)`` long, 0 for the shared prefix, k >= 1 for the k-th packed item.
        valid: ``(B, N)`` bool, False for padding. Default: all.

    Raises:
        ValueError: if the shapes do not agree.
    """
    valid = _checked(group, valid)
    index = torch.arange(group.shape[1], device=group.device)
    # how many of its own item stand before each token, and for items the whole prefix too
    same = (group[:, None, :] == group[:, :, None]) & (index[None, :] < index[:, None]) & valid[:, None, :]
    prefix = ((group == 0) & valid).sum(-1, keepdim=True)
    return (same.sum(-1) + torch.where(group > 0, prefix, 0)) * valid


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as what is added to attention scores: 0 where it is True, the lowest number where it is False."""
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)


def _checked(group: Tensor, valid: Tensor | None, image: Tensor | None = None) -> Tensor:
    if group.ndim != 2:
        raise ValueError(f"group must be (batch, tokens), got shape {tuple(group.shape)}")
    for name, value in (("image", image), ("valid", valid)):
        if value is not None and value.shape != group.shape:
            raise ValueError(f"{name} must have shape {tuple(group.shape)}, got {tuple(value.shape)}")
    return torch.ones_like(group, dtype=torch.bool) if valid is None else valid
