"""Ways to attend to a long context that are compared with multipole attention, all on one filled cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import quickmerge as qm
from quickmerge.bench.harness import Arm
from quickmerge.models.decoder import find_decoder, watch
from quickmerge.multipole.clustering import bounds
from quickmerge.multipole.clusters import Clusters

ALL = 10**6
"""A budget that no context here exhausts."""
USUAL = qm.Multipole()
WIDE = 2048
"""The most keys that a choice by probability may read."""
BUDGETS = (0, 64, 128, 512)


def arm(name: str, settings: qm.Multipole, budget: int | None, attach: Any = None) -> Arm:
    """One way to attend: ``attach(model, cache)`` is what makes the model read the cache in this way.

    ``budget`` goes into the results, as keys that are read exactly (None: all); ``multipole`` are the settings whose
    sink, buffer and clusters are meant, also where something else is read in place of the clusters.
    """
    return Arm(name, attach, {"budget": budget, "multipole": settings})


def dense(name: str = "dense") -> Arm:
    """The model's own attention."""
    return arm(name, USUAL, None)


def clusters(name: str, settings: qm.Multipole) -> Arm:
    """`quickmerge.multipole` as a user runs it; clusters of an earlier arm with such settings are used again."""
    budget = None if settings.budget >= ALL else settings.budget
    return arm(name, settings, budget, lambda model, cache: qm.multipole(model, settings))


def labelled(name: str, settings: qm.Multipole, how: str = "runs") -> Arm:
    """The same with other labels than those of k-means: ``runs`` of successive keys, or ``random`` ones."""

    def attach(model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        first, last = clustered(cache.get_seq_length(), settings)
        length, count = last - first, settings.clusters(last - first)
        for index, layer in enumerate(cache.layers):
            shape = (*layer.keys.shape[:2], length)
            if how == "runs":
                labels = (torch.arange(length) * count // length).expand(shape)
            else:
                labels = torch.randint(count, shape, generator=torch.Generator().manual_seed(index))
            start = torch.full(shape[:1], first)
            layer.clusters = Clusters.from_labels(layer.keys, layer.values, labels, start, count)
            layer.coarse, layer.made_with, layer.stale = None, settings, False
        return qm.multipole(model, settings)

    return replace(clusters(name, settings), attach=attach)


def window(name: str, budget: int, settings: qm.Multipole, centroids: bool = False) -> Arm:
    """A sliding window with sink that reads as many keys as multipole attention, or as many bytes.

    Args:
        name: in the results.
        budget: clustered keys that it reads, the most recent ones.
        settings: see `arm`.
        centroids: read as many more keys as multipole attention has centroids.
    """

    def attach(model: Any, cache: qm.MultipoleCache) -> Masked:
        first, last = clustered(cache.get_seq_length(), settings)
        begin = last - budget - (settings.clusters(last - first) if centroids else 0)

        def seen(query: Tensor, key: Tensor, scaling: float) -> Tensor:
            column = torch.arange(key.shape[2])
            return (column < first) | (column >= begin)

        return Masked(model, seen)

    return arm(name, settings, budget, attach)


def best(name: str, budget: int, settings: qm.Multipole) -> Arm:
    """The keys of the largest attention, known by reading all of it: the limit of every selection without centroids."""

    def attach(model: Any, cache: qm.MultipoleCache) -> Masked:
        first, last = clustered(cache.get_seq_length(), settings)

        def seen(query: Tensor, key: Tensor, scaling: float) -> Tensor:
            heads, q, n = key.shape[1], query.shape[2], key.shape[2]
            grouped = query.unflatten(1, (heads, -1)).flatten(2, 3)
            score = (grouped @ key.transpose(2, 3)).unflatten(2, (-1, q)) * scaling
            score = score.masked_fill(~causal(q, n), -torch.inf)
            share = score.softmax(-1).sum(2)[..., first:last]  # one choice for the query heads of a key's head
            largest = share.topk(min(budget, last - first), -1).indices
            chosen = torch.ones(*share.shape[:3], n, dtype=torch.bool)
            chosen[..., first:last] = torch.zeros_like(share, dtype=torch.bool).scatter(-1, largest, True)
            return chosen.repeat_interleave(query.shape[1] // heads, 1)

        return Masked(model, seen)

    return arm(name, settings, budget, attach)


class Masked:
    """Inside this context every block of a model attends to what ``seen(query, key, scaling)`` says, causally.

    ``query (1, Hq, q, D)``, ``key (1, H, n, D)``; what it returns broadcasts to ``(1, Hq, q, n)``.
    """

    def __init__(self, model: Any, seen: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        self.decoder = find_decoder(model)
        self.seen = seen
        self._undo: Callable[[], None] | None = None

    def __enter__(self) -> Masked:
        self._undo = watch(self.decoder, self)
        return self

    def __exit__(self, *error: object) -> None:
        if self._undo is not None:
            self._undo()

    def attend(self, layer: int, call: Any, module: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """See `quickmerge.models.decoder.Watcher`."""
        query, key, value = args[:3]
        scaling = kwargs["scaling"]
        mask = causal(query.shape[2], key.shape[2]) & self.seen(query, key, scaling)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2), None


def causal(q: int, n: int) -> Tensor:
    """``(q, n)``: the last ``q`` of ``n`` tokens see themselves and all before."""
    return torch.arange(n) <= torch.arange(n - q, n)[:, None]


def clustered(tokens: int, settings: qm.Multipole) -> tuple[int, int]:
    """The first column that is clustered of a context of ``tokens``, and the one behind the last."""
    start, end = bounds(torch.zeros(1, dtype=torch.long), tokens, settings)
    return int(start), int(end)


def context_arms(budgets: tuple[int, ...] = BUDGETS) -> list[Arm]:
    """All that is compared on long contexts. Arms that share clusters stand together."""
    some = [budget for budget in budgets if budget]
    arms: list[Arm] = [dense()]
    for space in ("rotated", "windowed"):
        base = replace(USUAL, space=space)
        for budget in (*budgets, ALL):
            arms.append(clusters("multipole", replace(base, budget=budget)))
            arms.append(clusters("sparse", replace(base, budget=budget, replacement=False)))
    arms += [clusters("multipole", replace(USUAL, budget=budget, first=2)) for budget in some]
    wide = replace(USUAL, budget=WIDE, select="top_p")
    arms += [clusters("multipole", replace(wide, top_p=p)) for p in (0.8, 0.9, 0.95)]
    arms += [clusters("multipole", replace(USUAL, budget=budget, variance=True)) for budget in budgets]
    for ratio in (1 / 8, 1 / 32):
        arms += [clusters("multipole", replace(USUAL, budget=budget, ratio=ratio)) for budget in some]
    two = replace(USUAL, ratio=1 / 8, coarse=1 / 64)
    arms += [clusters("multipole", replace(two, budget=budget)) for budget in some]
    arms += [labelled("runs of keys", replace(USUAL, budget=budget)) for budget in budgets]
    arms += [labelled("random clusters", replace(USUAL, budget=budget), "random") for budget in budgets]
    arms += [window("window", budget, USUAL) for budget in budgets]
    arms += [window("window of as many bytes", budget, USUAL, centroids=True) for budget in budgets]
    arms += [best("best keys", budget, USUAL) for budget in budgets]
    return arms


def retrieval_arms(budgets: tuple[int, ...] = BUDGETS) -> list[Arm]:
    """What is compared where the context holds something that is needed again."""
    arms: list[Arm] = [dense()]
    for space in ("rotated", "windowed"):
        for budget in budgets:
            base = replace(USUAL, space=space, budget=budget)
            arms += [clusters("multipole", base), clusters("sparse", replace(base, replacement=False))]
    arms += [labelled("runs of keys", replace(USUAL, budget=budget)) for budget in budgets]
    arms += [window("window", budget, USUAL) for budget in budgets]
    arms += [best("best keys", budget, USUAL) for budget in budgets]
    return arms
