"""What multipole attention did: rows read, clusters, seconds, bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class MultipoleStats:
    """Counts of the last prompt and of everything that was read after it. Numbers of tokens and rows are means.

    ``blocks`` of the model's ``blocks_all`` read clusters; means are over these, over rows of the batch and key-value
    heads, and, where they say so, over new tokens. ``tokens`` in the cache, ``clustered`` of them, in ``clusters``.
    For a new token ``kept`` of them were read exactly, and ``rows_read`` rows of keys, values and centroids in all,
    where its model would have read ``rows_dense``.

    ``prefill_seconds`` are the decoder's forwards that read a prompt, with its own attention. ``decode_steps`` forwards
    read clusters, in ``decode_seconds``, of which ``attention_seconds`` were attention (on a GPU, those in which it was
    launched), ``clustering_seconds`` the first clustering, in front of the first of these forwards, and
    ``update_seconds`` the clustering of new tokens, ``updates`` times a block. ``cache_bytes`` are keys and values of
    these blocks with the room to spare, ``cluster_bytes`` everything that belongs to the clusters.
    """

    settings: str = "multipole"
    rows: int = 0
    blocks: int = 0
    blocks_all: int = 0
    tokens: float = 0.0
    clustered: float = 0.0
    clusters: float = 0.0
    kept: float = 0.0
    rows_read: float = 0.0
    rows_dense: float = 0.0
    prefill_seconds: float = 0.0
    clustering_seconds: float = 0.0
    updates: float = 0.0
    update_seconds: float = 0.0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    attention_seconds: float = 0.0
    cache_bytes: int = 0
    cluster_bytes: int = 0

    @property
    def decode_seconds_per_step(self) -> float:
        """Seconds of the decoder for a forward that reads clusters, updates inside, the first clustering left out."""
        return (self.decode_seconds - self.clustering_seconds) / self.decode_steps if self.decode_steps else 0.0

    @property
    def read_share(self) -> float:
        """``rows_read`` by ``rows_dense``; 1 where nothing was read by clusters."""
        return self.rows_read / self.rows_dense if self.rows_dense else 1.0

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        derived = {"decode_seconds_per_step": self.decode_seconds_per_step, "read_share": self.read_share}
        return {**self.__dict__, **derived}

    def __str__(self) -> str:
        head = f"{self.settings}, {self.blocks} of {self.blocks_all} blocks, {self.rows} row(s)"
        if not self.tokens:
            return f"{head}: nothing has been read yet"
        if not self.clusters:
            return f"{head}, {self.tokens:g} tokens: too few to cluster, all of them read exactly"
        updated = f"; {self.updates:g} updates in {self.update_seconds:.3f} s" if self.updates else ""
        step, attention = self.decode_seconds_per_step, self.attention_seconds / max(1, self.decode_steps)
        return (
            f"{head}\n"
            f"  clusters: {self.clusters:g} of {self.clustered:g} of {self.tokens:g} tokens, "
            f"{self.clustering_seconds:.3f} s{updated}\n"
            f"  read:     {self.rows_read:.0f} of {self.rows_dense:.0f} rows for each new token and key-value head "
            f"({100 * self.read_share:.0f} %), {self.kept:.0f} clustered tokens exactly\n"
            f"  decode:   {self.decode_steps} steps, {1e3 * step:.1f} ms each without clustering, of which attention "
            f"{1e3 * attention:.1f} ms\n"
            f"  cache:    {self.cache_bytes / 2**20:.2f} MiB, and {self.cluster_bytes / 2**20:.2f} MiB of clusters"
        )
