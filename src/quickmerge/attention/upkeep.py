"""When the clusters of a cache layer are made, and when new tokens join them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from quickmerge.attention.cache import MultipoleLayer
from quickmerge.attention.clustering import Columns, bounds, cluster, extend
from quickmerge.attention.clusters import Clusters
from quickmerge.attention.settings import Multipole
from quickmerge.attention.two_level import coarsen

__all__ = ["refresh"]

READING = ("budget", "select", "top_p", "replacement", "query_position", "update", "first", "queries")
"""Settings that are of no account for what the clusters are."""


def refresh(held: MultipoleLayer, new: int, size: Tensor | None, settings: Multipole, keys: Columns) -> None:
    """Bring the clusters of a layer up to date, in front of the attention of ``new`` tokens that it already holds.

    How many tokens are clustered depends on how many there were before the new ones, and not on how they came. Where
    nothing is due it costs nothing. Clusters that were made with other settings are dropped first. No gradient goes
    through the centroids.

    Args:
        held: the layer; its ``clusters`` are changed, and ``coarse`` with them.
        new: how many of its last columns are the new tokens.
        size: ``(B, n)`` tokens that each column stands for, 0 for padding. Default: one each.
        settings: how to cluster.
        keys: in the space of the clusters, see `quickmerge.attention.clustering.cluster`.
    """
    if held.made_with not in (None, settings) and _kind(held.made_with) != _kind(settings):
        held.forget_clusters()
    old, coarse = held.clusters, held.coarse
    with torch.no_grad():
        if held.stale or settings.update:
            held.clusters = _grown(held, held.get_seq_length() - new, size, settings, keys)
        held.stale, held.made_with = False, settings
        if held.clusters is None or settings.coarse is None:
            held.coarse = None
        elif coarse is None or held.clusters is not old:
            before = None if old is None or coarse is None else (old, coarse)
            held.coarse = coarsen(held.clusters, settings, before)


def _grown(held: MultipoleLayer, past: int, size: Tensor | None, settings: Multipole, keys: Columns) -> Clusters | None:
    """The clusters with every group in them that is due; the very same where none is."""
    old = held.clusters
    if past < held.due(settings):
        return old
    if old is None:
        start, end = bounds(_first(size, held.keys), past, settings)
        return cluster(keys, held.values, size, start, end, settings)
    start, end = bounds(old.start - settings.sink, past, settings)
    return extend(old, keys, held.values, size, torch.maximum(end, old.end), settings)


def _first(size: Tensor | None, keys: Tensor) -> Tensor:
    """``(B,)`` long: the first column of each row that holds a token."""
    if size is None:
        return torch.zeros(len(keys), dtype=torch.long, device=keys.device)
    return (size > 0).to(torch.uint8).argmax(-1)


def _kind(settings: Multipole) -> Multipole:
    usual = Multipole()
    return replace(settings, **{name: getattr(usual, name) for name in READING})
