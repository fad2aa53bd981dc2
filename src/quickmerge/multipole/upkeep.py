"""When the clusters of a cache layer are made, and when new tokens join them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from quickmerge.models.columns import stored
from quickmerge.multipole.ahead import Ahead, Made, Unit, units_due, units_of
from quickmerge.multipole.cache import MultipoleLayer, next_due
from quickmerge.multipole.clustering import Columns, Source, bounds, cluster, extend
from quickmerge.multipole.clusters import Clusters
from quickmerge.multipole.exact import coarsen
from quickmerge.multipole.settings import Multipole

__all__ = ["READING", "prepare", "refresh"]

READING = ("budget", "select", "top_p", "replacement", "query_position", "update", "first", "queries", "ahead")
"""Settings that are of no account for what the clusters are."""


def refresh(
    held: MultipoleLayer,
    new: int,
    size: Tensor | None,
    settings: Multipole,
    keys: Columns,
    values: Tensor | None = None,
) -> None:
    """Bring the clusters of a layer up to date, in front of the attention of ``new`` tokens that it already holds.

    How many tokens are clustered depends on how many there were before the new ones, and not on how they came. Clusters
    that were made with other settings are dropped first. No gradient goes through the centroids.

    With ``settings.ahead`` some of what will be due next is found too, see `quickmerge.multipole.ahead`.

    Args:
        held: the layer; its ``clusters`` are changed, and ``coarse`` with them.
        new: how many of its last columns are the new tokens.
        size: ``(B, n)`` tokens that each column stands for, 0 for padding. Default: one each.
        settings: how to cluster.
        keys: in the space of the clusters, see `quickmerge.multipole.clustering.cluster`.
        values: ``(B, H, n, Dv)``, where attention reads others than the layer holds, as those that are made of a latent
            vector. Default: the layer's.
    """
    _settle(held, stored(held) - new, settings)
    with torch.no_grad():
        upkeep = _Upkeep(held, stored(held) - new, size, settings, keys, held.values if values is None else values)
        if held.stale or settings.update:
            upkeep.now()
        if held.clusters is None or settings.coarse is None:
            held.coarse = None
        elif held.coarse is None:
            held.coarse = coarsen(held.clusters, settings)
        held.stale, held.made_with = False, settings
        if settings.ahead and settings.update:
            upkeep.next()


def prepare(
    held: MultipoleLayer,
    new: int,
    size: Tensor | None,
    settings: Multipole,
    keys: Columns,
    values: Tensor | None = None,
) -> None:
    """Find the clusters that the next token will read, of all that a layer holds now; it is not given them yet.

    A prompt that comes in pieces has the last of its open blocks clustered for each of them, which only then turns out
    to be in vain. So nothing is done for a piece of less than a quarter of the columns that it takes.

    Args:
        held: the layer; its ``ahead`` is changed.
        new: how many of its last columns are the piece.
        size, settings, keys, values: see `refresh`.
    """
    past = stored(held)
    _settle(held, past - new, settings)
    with torch.no_grad():
        _Upkeep(held, past, size, settings, keys, held.values if values is None else values).whole(new)
    held.made_with = settings


def _settle(held: MultipoleLayer, past: int, settings: Multipole) -> None:
    """Drop what other settings made, and what was found for columns that are there no more."""
    if held.made_with not in (None, settings) and _kind(held.made_with) != _kind(settings):
        held.forget_clusters()
    if held.ahead.columns > past:
        held.ahead.drop()


class _Turn(NamedTuple):
    """The units of each row that should be found by now, whether the group that is due first is complete with these,
    and one past the last clustered column of each row when it has joined."""

    units: list[list[Unit]]
    complete: bool
    end: list[int]


@dataclass
class _Upkeep:
    """A layer with ``past`` columns in front of those that are new, and what `refresh` was told."""

    held: MultipoleLayer
    past: int
    size: Tensor | None
    settings: Multipole
    keys: Columns
    values: Tensor

    def now(self) -> None:
        """Cluster every group that is due."""
        held, old = self.held, self.held.clusters
        if self.past < held.due(self.settings):
            return
        start, end = self._bounds()
        made = held.ahead.made
        if made is not None and made.base is old and (made.start, made.end) == (start.tolist(), end.tolist()):
            held.clusters, held.coarse = made.clusters, made.coarse
        else:
            held.clusters, held.coarse = self._complete(start, end)
        for row, known in enumerate(held.ahead.parts):
            if held.clusters is not None and (old is None or held.clusters.blocks[row] != old.blocks[row]):
                known.clear()
        if made is not None and held.clusters is made.clusters and made.parts:
            held.ahead.parts = made.parts
        held.ahead.made = None

    def whole(self, new: int) -> None:
        """Find what `now` would find, if the last ``new`` columns are a good part of what it takes."""
        held = self.held
        if self.past < held.due(self.settings):
            return
        start, end = self._bounds()
        wanted = self._wanted(start.tolist(), end.tolist(), held.clusters)
        # What was found of an open block that is open no longer is of no use.
        known = held.ahead.parts if len(held.ahead.parts) == len(wanted) else [{} for _ in wanted]
        keys = [{unit.key for unit in units} for units in wanted]
        held.ahead.parts = [{k: v for k, v in a.items() if k in b} for a, b in zip(known, keys, strict=True)]
        left = [
            sum({unit.block: unit.task.length for unit in units if unit.key not in own}.values())
            for units, own in zip(wanted, held.ahead.parts, strict=True)
        ]
        if 4 * new < max(left):
            return
        held.ahead.columns = self.past
        self._finish(start, end)
        made = held.ahead.made
        if made is None or not self.settings.update:
            return
        # The prompt may end anywhere between two groups, so some of the next one should be found by now, too.
        turn = self._turn(made.start, made.end, made.clusters)
        if turn is not None:
            later = Ahead()
            later.work(self._source(made.start), turn.units, self.settings, made.clusters)
            held.ahead.made = made._replace(parts=later.parts)
            held.ahead.reach = max(held.ahead.reach, later.reach)

    def next(self) -> None:
        """Find some of what will be due next, as much as the layer's turn is."""
        held, old = self.held, self.held.clusters
        ahead = held.ahead
        if held.facts is not None:
            start, end = held.facts.start, held.facts.end
        elif self.past < held.due(self.settings) - self.settings.interval:
            return
        else:
            start = [int(column) + self.settings.sink for column in _first(self.size, held.keys).tolist()]
            end = start
        turn = self._turn(start, end, old)
        if turn is None:
            return
        ahead.columns = self.past
        ahead.work(self._source(start), turn.units, self.settings, old)
        if turn.complete and (ahead.made is None or ahead.made.base is not old):
            device = held.keys.device
            self._finish(torch.tensor(start, device=device), torch.tensor(turn.end, device=device))

    def _turn(self, start: list[int], end: list[int], base: Clusters | None) -> _Turn | None:
        """What should be found by now of what joins ``base`` next; None where nothing of that is there yet."""
        step = self.settings.interval
        due = [next_due(first, last, self.settings) for first, last in zip(start, end, strict=True)]
        there = [self.past - column + step for column in due]
        if max(there) < 0:
            return None
        # Rows whose next group is not there yet have nothing to be found for.
        goal = [
            first + ((column - first) // step - 1) * step if n >= 0 else last
            for first, column, n, last in zip(start, due, there, end, strict=True)
        ]
        every = self._wanted(start, goal, base)
        count = [units_due(n, step, len(units), *self.held.place) for n, units in zip(there, every, strict=True)]
        first = [column == min(due) for column in due]
        return _Turn(
            [units[:n] for units, n in zip(every, count, strict=True)],
            all(n == len(units) for n, units, its in zip(count, every, first, strict=True) if its),
            [column if its else last for column, last, its in zip(goal, end, first, strict=True)],
        )

    def _finish(self, start: Tensor, end: Tensor) -> None:
        """Put what was found together, with what it goes on from."""
        clusters, coarse = self._complete(start, end)
        if clusters is not None:
            base = self.held.clusters
            self.held.ahead.made = Made(base, start.tolist(), end.tolist(), clusters, coarse)

    def _complete(self, start: Tensor, end: Tensor) -> tuple[Clusters | None, Clusters | None]:
        """Clusters, and coarse ones where there are to be two levels, with ``end`` one past their last column."""
        old, first = self.held.clusters, start.tolist()
        self.held.ahead.work(self._source(first), self._wanted(first, end.tolist(), old), self.settings, old)
        ready = self.held.ahead.parts
        if old is None:
            clusters = cluster(self.keys, self.values, self.size, start, end, self.settings, ready)
        else:
            clusters = extend(old, self.keys, self.values, self.size, end, self.settings, ready)
        if clusters is None or clusters is old or self.settings.coarse is None:
            return clusters, self.held.coarse if clusters is old else None
        before = None if old is None or self.held.coarse is None else (old, self.held.coarse)
        return clusters, coarsen(clusters, self.settings, before)

    def _wanted(self, start: list[int], end: list[int], base: Clusters | None) -> list[list[Unit]]:
        """What it takes for each row to have the columns from ``start`` to ``end`` clustered, ``base`` being there."""
        return [
            units_of([] if base is None else base.blocks[row], b - a, self.values, self.settings)
            for row, (a, b) in enumerate(zip(start, end, strict=True))
        ]

    def _bounds(self) -> tuple[Tensor, Tensor]:
        """First column of each row's clusters, and one past the last that is due."""
        old = self.held.clusters
        if old is None:
            return bounds(_first(self.size, self.held.keys), self.past, self.settings)
        start, end = bounds(old.start - self.settings.sink, self.past, self.settings)
        return start, torch.maximum(end, old.end)

    def _source(self, start: list[int]) -> Source:
        return Source(self.keys, self.values, self.size, start)


def _first(size: Tensor | None, keys: Tensor) -> Tensor:
    """``(B,)`` long: the first column of each row that holds a token."""
    if size is None:
        return torch.zeros(len(keys), dtype=torch.long, device=keys.device)
    return (size > 0).to(torch.uint8).argmax(-1)


def _kind(settings: Multipole) -> Multipole:
    usual = Multipole()
    return replace(settings, **{name: getattr(usual, name) for name in READING})
