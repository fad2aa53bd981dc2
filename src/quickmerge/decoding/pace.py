"""Whether to draft at all: a draft that costs more than it gives is left out for a while."""

from __future__ import annotations

from collections import deque

from quickmerge.decoding.cost import Cost

__all__ = ["Pace"]

LATEST = 8
"""Drafts that are looked at."""
FEWEST = 2
"""Drafts before anything is decided."""
FIRST, LONGEST = 8, 64
"""Steps without a draft: at first, and at most."""
CHEAP = 0.1
"""A draft that takes less than this share of a plain pass is always made: the size of the tree then says enough."""
TRUST = 4.0
"""Accepted tokens that count as foreseen before any was seen."""


class Pace:
    """Decides before each step whether it drafts.

    With the N best nodes of a draft a step gives ``1 + g e`` tokens a row in ``c(N) + d`` seconds, where e is the sum
    of their path probabilities without the root's, d what drafts take, and g corrects the drafter's probabilities:
    tokens accepted so far over tokens foreseen. A step without a draft gives 1 in ``c(1)``. Where the mean of the
    latest drafts is the slower way, the next 8 steps go without one, then 16, and so on up to 64, one draft in
    between to see whether that has changed. So a drafter that never pays costs little more than its first drafts.

    Args:
        cost: of the target.
    """

    def __init__(self, cost: Cost) -> None:
        self._cost = cost
        self._rates: deque[float] = deque(maxlen=LATEST)
        self._foreseen = self._accepted = TRUST
        self._pause = FIRST
        self._left = 0
        self._needed = FEWEST

    def drafts(self) -> bool:
        """Whether the step that begins now shall draft."""
        if self._left:
            self._left -= 1
            return False
        return True

    def saw(self, rows: int, nodes: int, foreseen: float, accepted: int, draft_seconds: float) -> None:
        """Take in a step that drafted.

        Args:
            rows: that took part.
            nodes: read for each row, the root included.
            foreseen: path probabilities of what was read, roots left out, summed over the rows.
            accepted: drafted tokens that were, of all rows.
            draft_seconds: what a draft takes on average.
        """
        self._foreseen += foreseen
        self._accepted += accepted
        plain = self._seconds(rows, 1)
        given = rows + foreseen * self._accepted / self._foreseen
        rate = given / (self._seconds(rows, nodes) + draft_seconds)
        self._rates.append(rate * plain / rows)  # against a step without a draft
        if draft_seconds < CHEAP * plain or len(self._rates) < self._needed:
            return
        if sum(self._rates) / len(self._rates) >= 1:
            self._pause = FIRST
            return
        self._left, self._pause = self._pause, min(2 * self._pause, LONGEST)
        self._rates.clear()
        self._needed = 1  # from now on one draft is a try

    def _seconds(self, rows: int, nodes: int) -> float:
        return float(self._cost.passes(rows, nodes)[-1])
