"""Clustering a little at a time, before it is due, so that no token waits for all of it.

A group of new tokens joins the clusters when ``interval`` more have come behind it. All that is to be known for that is
known ``interval`` tokens earlier: its keys are there. So the k-means that its joining takes is done in the meantime, a
key-value head at a time, and the blocks of a model take turns. What comes out is what would have come out, and it joins
when it would have joined; only when the work is done is another matter. Whatever changes the columns in between drops
what was found for them, and it is found again when it is due.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from quickmerge.multipole.clustering import Source, Task, solve, tasks, together
from quickmerge.multipole.clusters import Block, Clusters, Summary
from quickmerge.multipole.settings import Multipole

__all__ = ["Ahead", "Made", "Unit", "units_due", "units_of"]


class Unit(NamedTuple):
    """A block of a row that is to be clustered, for some of the heads."""

    task: Task
    block: Block
    heads: slice

    @property
    def key(self) -> tuple[Task, Block, int]:
        """What it is found by."""
        return self.task, self.block, self.heads.start


class Made(NamedTuple):
    """Clusters that are complete before they are due.

    ``base`` are those that they go on from, ``start`` and ``end`` the first clustered column of each row and one past
    the last; ``parts``, as in `Ahead`, what is found already of those that will go on from these.
    """

    base: Clusters | None
    start: list[int]
    end: list[int]
    clusters: Clusters
    coarse: Clusters | None
    parts: list[dict[tuple[Task, Block, int], Summary]] = []  # noqa: RUF012  (never changed where there are none)


@dataclass
class Ahead:
    """What was clustered before it is due, of one layer of a cache.

    ``parts``: for each row what `quickmerge.multipole.clustering.solve` found, by task, block and first head.
    ``made``: complete clusters; None where there are none yet.
    ``columns``: how many columns there were when something was found, and must still be there.
    ``reach``: one past the last column that anything was found for.
    ``worked``: how many blocks' worth of clustering were done since somebody asked, a row's share of it for each row.
    """

    parts: list[dict[tuple[Task, Block, int], Summary]] = field(default_factory=list)
    made: Made | None = None
    columns: int = 0
    reach: int = 0
    worked: float = 0.0

    def drop(self) -> None:
        """Forget everything but what was counted."""
        self.parts, self.made, self.columns, self.reach = [], None, 0, 0

    def take(self) -> float:
        """What was ``worked`` since this was asked last."""
        worked, self.worked = self.worked, 0.0
        return worked

    def crop(self, columns: int) -> None:
        """Some of the last columns are gone."""
        if columns < self.reach:
            self.drop()
        self.columns = min(self.columns, columns)

    def select_rows(self, rows: Sequence[int], base: Clusters | None) -> None:
        """Rows were picked, and with them ``base``."""
        self.parts = [dict(self.parts[row]) for row in rows] if self.parts else []
        self.made = None if base is None else self._moved(base, rows)

    def _moved(self, base: Clusters, rows: Sequence[int]) -> Made | None:
        made = self.made
        if made is None or made.base is None:
            return None
        start, end = ([x[row] for row in rows] for x in (made.start, made.end))
        index = base.start.new_tensor(list(rows))
        coarse = None if made.coarse is None else made.coarse.select_rows(index)
        parts = [dict(made.parts[row]) for row in rows] if made.parts else []
        return Made(base, start, end, made.clusters.select_rows(index), coarse, parts)

    def slide(self, by: Sequence[int], base: Clusters | None) -> None:
        """Rows moved to the right by so many columns, and with them ``base``."""
        made = self.made
        self.reach += max(by)
        if made is None or base is None or made.base is None:
            self.made = None
            return
        start, end = ([a + b for a, b in zip(x, by, strict=True)] for x in (made.start, made.end))
        step = base.start.new_tensor(list(by))
        clusters = replace(made.clusters, start=made.clusters.start + step, end=made.clusters.end + step)
        self.made = Made(base, start, end, clusters, made.coarse, made.parts)

    def work(
        self, source: Source, wanted: Sequence[Sequence[Unit]], settings: Multipole, old: Clusters | None = None
    ) -> None:
        """Find the ``wanted`` units of each row that are not known yet; rows for which the same is to do, at once."""
        if len(self.parts) != len(wanted):
            self.parts = [{} for _ in wanted]
        jobs: dict[tuple[Task, int, int], list[tuple[int, Unit]]] = {}
        for row, units in enumerate(wanted):
            for place, unit in enumerate(units):
                if unit.key not in self.parts[row]:
                    jobs.setdefault((unit.task, place, unit.heads.start), []).append((row, unit))
        for (task, _, _), own in jobs.items():
            rows, heads = [row for row, _ in own], own[0][1].heads
            part = solve(source, rows, task, [unit.block for _, unit in own], heads, settings, old)
            for i, (row, unit) in enumerate(own):
                self.parts[row][unit.key] = part.row(i)
                self.reach = max(self.reach, source.start[row] + unit.block.first + unit.block.length)
            self.worked += (heads.stop - heads.start) / source.values.shape[1] * len(rows) / len(wanted)


def units_of(row: Sequence[Block], columns: int, values: Tensor, settings: Multipole) -> list[Unit]:
    """What it takes for a row with these blocks to have ``columns`` clustered columns."""
    _, wanted = tasks(row, columns, settings)
    return [Unit(task, block, heads) for task, block in wanted for heads in together(values)]


def units_due(done: int, interval: int, units: int, place: int, layers: int) -> int:
    """How many of the ``units`` of a layer should be found, ``done`` tokens after a group is there to be clustered.

    The units of all layers, one layer behind the other, are spread evenly over ``interval`` tokens, so at every token
    ``ceil(layers * units / interval)`` of them are due at most, and all of them before the group joins.

    Args:
        done: 0 up to ``interval - 1``.
        interval: tokens from when the group is there until it joins.
        units: of this layer, and of each other one.
        place: which of the layers it is, from 0 on.
        layers: how many there are.
    """
    passed = -(-(done + 1) * layers * units // interval)
    return max(0, min(units, passed - place * units))
