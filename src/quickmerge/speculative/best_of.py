"""Two drafters as one: of each draft the one that is worth more."""

from __future__ import annotations

import copy
import time
from collections import deque
from dataclasses import dataclass
from statistics import median

from torch import Tensor
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.speculative.cost import Cost, best_size
from quickmerge.speculative.drafter import Drafter
from quickmerge.speculative.tree import Tree

__all__ = ["BestOf"]

LATEST = 16
"""Drafts of ``other`` from which is told what the next one is worth."""
AGAIN = 32
"""Drafts in a row for which ``other`` is not asked at most: texts change."""


class BestOf(Drafter):
    """Drafts with ``first``, which costs next to nothing, and with ``other`` where that is expected to give more.

    For each step the draft of ``first`` is there at once, with the tokens that it is expected to give. The same of
    ``other`` is told from what its latest drafts gave and took. Where ``first`` is then expected to give more tokens a
    second, by what passes of the target take, ``other`` is not asked; where it is asked, each row gets the draft with
    the larger sum of path probabilities, times how far the sums of its drafter have been true so far.

    So lookup or suffix decoding serves what is quoted, and trained heads what is new.

    Args:
        first: such as `SuffixDecoding` or `PromptLookup`.
        other: such as `Gumiho`.

    Raises:
        QuickmergeError: if one is no drafter, or both are the same object.
    """

    def __init__(self, first: Drafter, other: Drafter) -> None:
        for name, given in (("first", first), ("other", other)):
            if not isinstance(given, Drafter):
                raise QuickmergeError(f"{name} must be a quickmerge Drafter such as PromptLookup(), got {given!r:.200}")
        if first is other:
            raise QuickmergeError("other must be another drafter than first, got the same object twice")
        self.first, self.other = first, other
        self.needs_features = first.needs_features or other.needs_features
        self._cost: Cost | None = None
        self._start()

    def __copy__(self) -> BestOf:
        """A copy drafts with copies of both."""
        return BestOf(copy.copy(self.first), copy.copy(self.other))

    def _start(self) -> None:
        self._seconds: deque[float] = deque(maxlen=LATEST)
        # for each row what both foresaw when both were asked, and the seconds of that step
        self._asked: deque[tuple[list[tuple[float, float]], float]] = deque(maxlen=LATEST)
        self._skipped = 0
        self._steps: list[_Step] = []  # one a row
        self._took = 0.0  # seconds of the pass over them
        self._written: list[int] = []
        self._foreseen, self._accepted = [4.0, 4.0], [4.0, 4.0]

    def check(self, model: PreTrainedModel) -> None:
        """Raise where one of the two can't draft for ``model``."""
        self.first.check(model)
        self.other.check(model)

    def expect(self, cost: Cost | None) -> None:
        """Hear what passes take."""
        self._cost = cost
        self.first.expect(cost)
        self.other.expect(cost)

    def begin(
        self, model: PreTrainedModel, ids: Tensor, valid: Tensor, features: Tensor | None, positions: Tensor
    ) -> None:
        """Both take in the prompt."""
        self._start()
        for drafter in (self.first, self.other):
            drafter.begin(model, ids, valid, features if drafter.needs_features else None, positions)

    def draft(self, last: Tensor, nodes: int) -> list[Tree]:
        """The better draft of each row."""
        self._learn()
        trees = self.first.draft(last, nodes)
        self._steps = self._read([0] * len(trees), trees, 0.0)
        if self._enough():
            self._skipped += 1
            return trees
        self._skipped = 0
        start = time.perf_counter()
        others = self.other.draft(last, nodes)
        self._seconds.append(time.perf_counter() - start)
        seconds = median(self._seconds)
        pairs = [
            (mine.foreseen, theirs.foreseen)
            for mine, theirs in zip(self._steps, self._read([1] * len(others), others, seconds), strict=True)
        ]
        who = [int(self._true(1) * theirs > self._true(0) * mine) for mine, theirs in pairs]
        found = [(a, b)[one] for one, a, b in zip(who, trees, others, strict=True)]
        self._steps = self._read(who, found, seconds)
        self._asked.append((pairs, self._took))
        return found

    def accept(self, tokens: list[Tensor], features: list[Tensor] | None) -> None:
        """Both take in what was written."""
        self.first.accept(tokens, features if self.first.needs_features else None)
        self.other.accept(tokens, features if self.other.needs_features else None)
        if self._written:  # there was no draft since
            self._steps = []
        self._written = [len(row) for row in tokens]

    def rows(self, index: Tensor) -> None:
        """Both go on with these rows alone."""
        self.first.rows(index)
        self.other.rows(index)
        keep = index.tolist()
        self._steps = [self._steps[i] for i in keep] if self._steps else []
        self._written = [self._written[i] for i in keep] if self._written else []

    def _read(self, who: list[int], trees: list[Tree], seconds: float) -> list[_Step]:
        """What a pass over these drafts is expected to give, in the size in which they are worth being read."""
        size = max(map(len, trees))
        if self._cost is not None:
            size = best_size([tree.prob for tree in trees], self._cost, seconds)
        self._took = 1.0 if self._cost is None else float(self._cost.passes(len(trees), size)[-1]) + seconds
        return [_Step(one, sum(tree.best(size).prob[1:])) for one, tree in zip(who, trees, strict=True)]

    def _true(self, who: int) -> float:
        """Tokens of a drafter that were accepted, for each that it foresaw."""
        return self._accepted[who] / self._foreseen[who]

    def _learn(self) -> None:
        """What the last drafts gave; nothing is learnt from a step without a draft."""
        if self._steps and len(self._written) == len(self._steps):
            for step, taken in zip(self._steps, self._written, strict=True):
                self._foreseen[step.who] += step.foreseen
                self._accepted[step.who] += taken - 1
        self._steps, self._written = [], []

    def _enough(self) -> bool:
        """Whether the drafts of ``first`` are expected to give more tokens a second than asking ``other`` too."""
        if not self._asked or self._skipped >= AGAIN:
            return False
        first, other = self._true(0), self._true(1)
        mine = len(self._steps) + first * sum(step.foreseen for step in self._steps)
        both = [
            sum(1 + max(first * a, other * b) for a, b in pairs) / (len(pairs) * seconds)
            for pairs, seconds in self._asked
        ]
        return mine / (len(self._steps) * self._took) >= sum(both) / len(both)


@dataclass(frozen=True)
class _Step:
    """Who drafted for a row, and how many tokens of what is read the drafter expects to be accepted."""

    who: int
    foreseen: float
