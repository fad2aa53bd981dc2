"""Counting what multipole attention reads, without making the device wait for it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from quickmerge.attention.cache import MultipoleLayer
from quickmerge.attention.settings import Multipole
from quickmerge.attention.summary import MultipoleStats


class Tally:
    """The sums behind a `MultipoleStats`; what is on the device stays there until somebody asks.

    Args:
        settings: of the run.
        blocks: how many blocks read clusters.
        blocks_all: how many the model has.
    """

    def __init__(self, settings: Multipole, blocks: int, blocks_all: int) -> None:
        self.settings = settings
        self._stats = MultipoleStats(settings=settings.label, blocks=blocks, blocks_all=blocks_all)
        self._queries = 0
        self._dense = self._others = 0.0
        self._kept: Tensor | float = 0.0

    def clustered(self, anew: bool, seconds: float) -> None:
        """Clusters of one block were made ``anew``, or new tokens joined them."""
        if anew:
            self._stats.clustering_seconds += seconds
        else:
            self._stats.updates += 1 / self._stats.blocks
            self._stats.update_seconds += seconds

    def read(self, held: MultipoleLayer, new: int, kept: Tensor | None, seconds: float) -> None:
        """One block read its cache for ``new`` tokens.

        Args:
            held: its layer.
            new: of the last columns.
            kept: ``(B, H, q)`` clustered columns that each of them read exactly; None if everything was.
            seconds: of attention.
        """
        self._stats.attention_seconds += seconds
        facts, repl = held.facts, 1 + self.settings.replacement
        # Of the new tokens the i-th sees i - 1 of the others.
        seen = held.get_seq_length() - (new - 1) / 2
        self._queries += new
        if facts is None or kept is None:
            self._dense += new * 2 * seen
            self._others += new * 2 * seen
            return
        rows = len(facts.start)
        whole = self.settings.select == "budget" and self.settings.budget >= facts.clusters.width
        for i, (start, end, fine) in enumerate(zip(facts.start, facts.end, facts.fine, strict=True)):
            valid = seen - max(0, start - self.settings.sink)
            looked = min(self.settings.budget, fine) + facts.upper[i] if facts.upper else fine
            centroids = 0 if whole else repl * looked
            self._dense += new * 2 * valid / rows
            self._others += new * (2 * (valid - (end - start)) + centroids) / rows
        self._kept = self._kept + kept.double().mean() * new

    def forward(self, seconds: float, short: bool, layers: Sequence[MultipoleLayer]) -> None:
        """One forward of the decoder: a ``short`` one, that may read clusters, or one that reads a prompt."""
        stats = self._stats
        if short:
            stats.decode_steps += 1
            stats.decode_seconds += seconds
        else:
            stats.prefill_seconds += seconds
        filled = [held for held in layers if held.get_seq_length()]
        if not filled:
            return
        stats.rows = len(filled[0].keys)
        stats.tokens = stats.clustered = stats.clusters = 0.0
        stats.cache_bytes = sum(held.bytes for held in filled)
        stats.cluster_bytes = 0
        for held in filled:
            facts, n = held.facts, held.get_seq_length()
            if facts is None:
                stats.tokens += n / len(filled)
                continue
            share = 1 / (len(filled) * len(facts.start))
            first = [max(0, start - self.settings.sink) for start in facts.start]
            stats.tokens += share * sum(n - column for column in first)
            stats.clustered += share * sum(e - s for s, e in zip(facts.start, facts.end, strict=True))
            stats.clusters += share * sum(facts.fine)
            stats.cluster_bytes += facts.bytes

    def stats(self) -> MultipoleStats:
        """Everything up to now."""
        stats, queries = self._stats, max(1, self._queries)
        stats.kept = float(self._kept) / queries
        stats.rows_dense = self._dense / queries
        stats.rows_read = self._others / queries + 2 * stats.kept
        return stats
