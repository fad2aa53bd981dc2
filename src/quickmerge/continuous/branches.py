"""Going on from many places of one text, which is read once: every branch sees the text up to its own place."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from quickmerge.models.compat import DynamicLayer

__all__ = ["branch_cache", "branch_mask", "can_branch"]


def can_branch(cache: Any) -> bool:
    """Whether every layer keeps all that it has read in plain sight.

    Layers that forget (sliding windows) or keep a state can't go back to an earlier place.
    """
    return isinstance(cache, Cache) and all(type(layer) is DynamicLayer for layer in cache.layers)


def branch_cache(cache: Cache, rows: int) -> Cache:
    """A copy of a text's cache for each of ``rows`` branches; the given one, of batch size 1, stays as it is."""
    own = copy.deepcopy(cache)
    own.batch_repeat_interleave(rows)
    return own


def branch_mask(places: Tensor, length: int, new: int) -> Tensor:
    """Attention mask ``(B, length + new)`` of branches that have read ``new`` entries of their own behind the text.

    Args:
        places: ``(B,)``: the branch sees the text's entries before this one.
        length: entries of the text in the cache.
        new: entries of the branch.
    """
    seen = torch.arange(length, device=places.device) < places[:, None]
    return torch.cat([seen, seen.new_ones(len(places), new)], 1).long()
