"""Telling training text from held-out text: no long passage may stand in both."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import whole_number

Ids: TypeAlias = Sequence[int] | NDArray[Any]

LONG = 32
"""Tokens in a row that two texts of different origin do not share by chance."""


class Passages:
    """Every run of ``n`` tokens in some documents, kept so that other documents can be looked up in them.

    Args:
        documents: the token ids of each held-out document.
        n: tokens of a passage, at least 1.
    """

    def __init__(self, documents: Iterable[Ids], n: int = LONG) -> None:
        n = whole_number("n", n)
        self.n = n
        # A fixed draw: a hash only has to spread, and the passages it finds are compared token by token.
        self._factors = np.random.default_rng(0).integers(1, 2**63, size=n, dtype=np.uint64)
        self._runs = [_runs(_array(ids), n) for ids in documents]
        hashes = np.concatenate([np.empty(0, np.uint64), *map(self._hash, self._runs)])
        order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[order]
        # which document each passage stands in, and where
        places = [(document, at) for document, runs in enumerate(self._runs) for at in range(len(runs))]
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)[order]

    def starts(self, ids: Ids) -> NDArray[np.bool_]:
        """Where passages that are known begin in a document of N tokens: (N - n + 1,) truth values, none if N < n."""
        runs = _runs(_array(ids), self.n)
        hashes = self._hash(runs)
        first = np.searchsorted(self._sorted, hashes, side="left")
        last = np.searchsorted(self._sorted, hashes, side="right")
        known = np.zeros(len(runs), dtype=np.bool_)
        for at in np.flatnonzero(last > first):
            places = self._places[first[at] : last[at]]
            known[at] = any(np.array_equal(self._runs[document][start], runs[at]) for document, start in places)
        return known

    def _hash(self, runs: NDArray[np.int64]) -> NDArray[np.uint64]:
        total = np.zeros(len(runs), dtype=np.uint64)
        for place, factor in enumerate(self._factors):  # column by column, so that no copy of all runs is made
            total += (runs[:, place].astype(np.uint64) + np.uint64(1)) * factor
        return total


def overlap(window_ids: Ids, held_out_ids: Ids, n: int = LONG) -> bool:
    """Whether any run of ``n`` tokens stands in both; texts shorter than ``n`` share none."""
    return bool(Passages([held_out_ids], n).starts(window_ids).any())


def _array(ids: Ids) -> NDArray[np.int64]:
    return np.asarray(ids, dtype=np.int64).reshape(-1)


def _runs(ids: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The runs of ``n`` tokens, (N - n + 1, n), as a view that takes no memory."""
    if len(ids) < n:
        return np.empty((0, n), np.int64)
    return np.lib.stride_tricks.sliding_window_view(ids, n)
