"""Ways to attend to a long context that are compared with multipole attention, all on one filled cache."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import quickmerge as qm
from quickmerge.models.decoder import find_decoder, watch
from quickmerge.multipole.clustering import bounds
from quickmerge.multipole.clusters import Clusters

ALL = 10**6
"""A budget that no context here exhausts."""
USUAL = qm.Multipole()
WIDE = 2048
"""The most keys that a choice by probability may read."""
BUDGETS = (0, 64, 128, 512)


class Arm(Protocol):
    """One way to attend.

    ``name`` and ``budget`` go into the results; ``settings`` are those of multipole attention whose sink, buffer and
    clusters are meant, also where something else is read in place of the clusters.
    """

    name: str
    budget: int | None
    settings: qm.Multipole

    def attach(self, model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        """Inside the context that this returns ``model`` reads ``cache`` in this way."""
        ...


@dataclass(frozen=True)
class Dense:
    """The model's own attention."""

    name: str = "dense"
    budget: int | None = None
    settings: qm.Multipole = USUAL

    def attach(self, model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        """Nothing."""
        return nullcontext()


@dataclass(frozen=True)
class Clustered:
    """`quickmerge.multipole` as a user runs it."""

    name: str
    settings: qm.Multipole

    @property
    def budget(self) -> int | None:
        """Keys that are read exactly; None: all."""
        return None if self.settings.budget >= ALL else self.settings.budget

    def attach(self, model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        """Clusters of an earlier arm with the same settings of clustering are used again."""
        return qm.multipole(model, self.settings)


@dataclass(frozen=True)
class Labelled(Clustered):
    """The same with other labels than those of k-means: ``runs`` of successive keys, or ``random`` ones."""

    how: str = "runs"

    def attach(self, model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        """Puts the clusters of these labels into the cache."""
        first, last = clustered(cache.get_seq_length(), self.settings)
        length, count = last - first, self.settings.clusters(last - first)
        for index, layer in enumerate(cache.layers):
            shape = (*layer.keys.shape[:2], length)
            if self.how == "runs":
                labels = (torch.arange(length) * count // length).expand(shape)
            else:
                labels = torch.randint(count, shape, generator=torch.Generator().manual_seed(index))
            start = torch.full(shape[:1], first)
            layer.clusters = Clusters.from_labels(layer.keys, layer.values, labels, start, count)
            layer.coarse, layer.made_with, layer.stale = None, self.settings, False
        return qm.multipole(model, self.settings)


@dataclass(frozen=True)
class Window:
    """A sliding window with sink that reads as many keys as multipole attention, or as many bytes.

    Args:
        name: in the results.
        budget: clustered keys that it reads, the most recent ones.
        settings: see `Arm`.
        centroids: read as many more keys as multipole attention has centroids.
    """

    name: str
    budget: int | None
    settings: qm.Multipole
    centroids: bool = False

    def attach(self, model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        """Attention behind a mask."""
        first, last = clustered(cache.get_seq_length(), self.settings)
        extra = self.settings.clusters(last - first) if self.centroids else 0
        begin = last - (self.budget or 0) - extra

        def seen(query: Tensor, key: Tensor, scaling: float) -> Tensor:
            column = torch.arange(key.shape[2])
            return (column < first) | (column >= begin)

        return Masked(model, seen)


@dataclass(frozen=True)
class Best:
    """The keys of the largest attention, known by reading all of it: the limit of every selection without centroids."""

    name: str
    budget: int | None
    settings: qm.Multipole

    def attach(self, model: Any, cache: qm.MultipoleCache) -> AbstractContextManager[Any]:
        """Attention behind a mask."""
        first, last = clustered(cache.get_seq_length(), self.settings)

        def seen(query: Tensor, key: Tensor, scaling: float) -> Tensor:
            heads, q, n = key.shape[1], query.shape[2], key.shape[2]
            grouped = query.unflatten(1, (heads, -1)).flatten(2, 3)
            score = (grouped @ key.transpose(2, 3)).unflatten(2, (-1, q)) * scaling
            score = score.masked_fill(~causal(q, n), -torch.inf)
            share = score.softmax(-1).sum(2)[..., first:last]  # one choice for the query heads of a key's head
            best = share.topk(min(self.budget or 0, last - first), -1).indices
            chosen = torch.ones(*share.shape[:3], n, dtype=torch.bool)
            chosen[..., first:last] = torch.zeros_like(share, dtype=torch.bool).scatter(-1, best, True)
            return chosen.repeat_interleave(query.shape[1] // heads, 1)

        return Masked(model, seen)


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
    arms: list[Arm] = [Dense()]
    for space in ("rotated", "windowed"):
        base = replace(USUAL, space=space)
        for budget in (*budgets, ALL):
            arms.append(Clustered("multipole", replace(base, budget=budget)))
            arms.append(Clustered("sparse", replace(base, budget=budget, replacement=False)))
    arms += [Clustered("multipole", replace(USUAL, budget=budget, first=2)) for budget in some]
    wide = replace(USUAL, budget=WIDE, select="top_p")
    arms += [Clustered("multipole", replace(wide, top_p=p)) for p in (0.8, 0.9, 0.95)]
    arms += [Clustered("multipole", replace(USUAL, budget=budget, variance=True)) for budget in budgets]
    for ratio in (1 / 8, 1 / 32):
        arms += [Clustered("multipole", replace(USUAL, budget=budget, ratio=ratio)) for budget in some]
    two = replace(USUAL, ratio=1 / 8, coarse=1 / 64)
    arms += [Clustered("multipole", replace(two, budget=budget)) for budget in some]
    arms += [Labelled("runs of keys", replace(USUAL, budget=budget)) for budget in budgets]
    arms += [Labelled("random clusters", replace(USUAL, budget=budget), "random") for budget in budgets]
    arms += [Window("window", budget, USUAL) for budget in budgets]
    arms += [Window("window of as many bytes", budget, USUAL, centroids=True) for budget in budgets]
    arms += [Best("best keys", budget, USUAL) for budget in budgets]
    return arms


def retrieval_arms(budgets: tuple[int, ...] = BUDGETS) -> list[Arm]:
    """What is compared where the context holds something that is needed again."""
    arms: list[Arm] = [Dense()]
    for space in ("rotated", "windowed"):
        for budget in budgets:
            base = replace(USUAL, space=space, budget=budget)
            arms += [Clustered("multipole", base), Clustered("sparse", replace(base, replacement=False))]
    arms += [Labelled("runs of keys", replace(USUAL, budget=budget)) for budget in budgets]
    arms += [Window("window", budget, USUAL) for budget in budgets]
    arms += [Best("best keys", budget, USUAL) for budget in budgets]
    return arms
