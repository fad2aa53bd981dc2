"""Ways to keep clusters while a text goes on that are compared with updating them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from multipole_arms import USUAL, clustered, clusters, dense

import quickmerge as qm
from quickmerge.bench.harness import Arm
from quickmerge.multipole import Clusters

Prepare = Callable[[qm.MultipoleCache, qm.Multipole], None]
"""What is done to the cache in front of every step."""


def generation_arms(budgets: Sequence[int]) -> Iterator[tuple[str, Arm, Prepare]]:
    """Name, attention, and what is done to the cache in front of every step."""
    yield "dense", dense(), leave
    for budget in budgets:
        usual, stale = (clusters("", replace(USUAL, budget=budget, update=update)) for update in (True, False))
        yield "updated", usual, leave
        yield "clustered anew", usual, forget
        yield "joined to old clusters", stale, join_old
        yield "never clustered", stale, leave


def leave(cache: qm.MultipoleCache, settings: qm.Multipole) -> None:
    """Nothing: updates are the run's own work."""


def forget(cache: qm.MultipoleCache, settings: qm.Multipole) -> None:
    """The next step clusters everything from the beginning."""
    for layer in cache.layers:
        layer.forget_clusters()


def join_old(cache: qm.MultipoleCache, settings: qm.Multipole) -> None:
    """New tokens that would be clustered join the nearest cluster of the prompt; no cluster is made or split."""
    _, last = clustered(cache.get_seq_length(), settings)
    for layer in cache.layers:
        old = layer.clusters
        if old is None or int(old.end[0]) == last:
            continue
        far = torch.cdist(layer.keys[:, :, int(old.end[0]) : last], old.key)
        far = far.masked_fill(old.members[:, :, None] == 0, torch.inf)
        labels = torch.cat([old.labels, far.argmin(-1).to(old.labels)], -1)
        layer.clusters = Clusters.from_labels(layer.keys, layer.values, labels, old.start, len(old))
