"""What multipole attention can be told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from quickmerge.errors import near_match, whole_number

SELECTS = ("budget", "top_p")
SPACES = ("rotated", "windowed")


@dataclass(frozen=True)
class Multipole:
    """Settings of multipole attention (arXiv 2506.13059).

    Args:
        budget: B, the most clustered keys that a new token reads exactly, for each key-value head. 0: centroids alone.
        select: ``"budget"`` reads the most promising clusters as long as they fit into B; ``"top_p"`` stops before
            that, at the first cluster with which they hold the share ``top_p`` of the attention (arXiv 2602.05191).
        top_p: that share, in (0, 1].
        ratio: clusters for each key, in (0, 1]. 1/16 makes one of 16 keys on average.
        coarse: with two levels, coarse clusters for each key, below ``ratio``; 1/64 goes with ``ratio=1/8``. None: one.
        space: which keys are clustered: ``"rotated"``, as the cache holds them; ``"windowed"``, with the rotary
            embedding taken off, and compared with a query that stands ``query_position`` tokens further.
        query_position: that distance, in tokens.
        replacement: let the clusters that are not read exactly take part as their centroids. False: leave them out.
        variance: correct the weight of a centroid for how far its members lie apart.
        sink: first tokens of a sequence that are never clustered.
        interval: tokens that are clustered together while generating; the newest ``interval`` tokens and up to as many
            again are always read exactly.
        block: W, tokens that are clustered together in a prompt; the last block has W/2 up to 3 W/2 of them.
        iterations: rounds of k-means for a block.
        update_iterations: rounds of k-means over the last block for every ``interval`` new tokens.
        update: cluster what is generated. False: the clusters of the prompt stay, and later tokens are read exactly.
        first: so many blocks of the model, from the first on, keep their own attention.
        min_tokens: a row of fewer tokens is read by the model's own attention until it has as many; 0: none is, but for
            want of tokens to cluster. `quickmerge.multipole.cost.pays_from` says from how many on clusters pay.
        queries: a forward of at most so many tokens on a filled cache reads clusters; a longer one reads a prompt, with
            the model's own attention.
        seed: for the draws of k-means.
        ahead: cluster a prompt while it is read, and what is generated a little for every token, before it is due.
            False: all of it when it is due. The clusters are the same.

    Raises:
        ValueError: for a value that is none of these.
    """

    budget: int = 512
    select: str = "budget"
    top_p: float = 0.95
    ratio: float = 1 / 16
    coarse: float | None = None
    space: str = "rotated"
    query_position: int = 2048
    replacement: bool = True
    variance: bool = False
    sink: int = 10
    interval: int = 128
    block: int = 8192
    iterations: int = 10
    update_iterations: int = 3
    update: bool = True
    first: int = 0
    min_tokens: int = 0
    queries: int = 128
    seed: int = 0
    ahead: bool = True

    LEAST: ClassVar[dict[str, int]] = {
        "budget": 0,
        "query_position": 0,
        "sink": 0,
        "interval": 1,
        "block": 2,
        "iterations": 1,
        "update_iterations": 0,
        "first": 0,
        "min_tokens": 0,
        "queries": 1,
        "seed": 0,
    }
    """The least value of every whole number."""

    def __post_init__(self) -> None:
        for name, least in self.LEAST.items():
            object.__setattr__(self, name, whole_number(name, getattr(self, name), least))
        for name, allowed in (("select", SELECTS), ("space", SPACES)):
            given = getattr(self, name)
            if given not in allowed:
                hint = near_match(str(given), allowed)
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}{hint}")
        for name in ("replacement", "variance", "update", "ahead"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}")
        _share("top_p", self.top_p)
        _share("ratio", self.ratio)
        if self.coarse is not None:
            _share("coarse", self.coarse)
            if self.coarse >= self.ratio:
                raise ValueError(f"coarse must be below ratio={self.ratio:g}, got {self.coarse!r}")

    @property
    def label(self) -> str:
        """``multipole`` and every setting that is not the default, such as ``multipole:budget=128:space=windowed``."""
        own = [(f.name, getattr(self, f.name), f.default) for f in fields(self)]
        return ":".join(["multipole", *(f"{name}={value}" for name, value, default in own if value != default)])

    def clusters(self, tokens: int) -> int:
        """How many clusters a block of ``tokens`` tokens gets: its share ``ratio``, rounded down, and at least one."""
        return max(1, int(tokens * self.ratio))


def _share(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"{name} must be a number above 0 and up to 1, got {value!r}")


# What multipole attention did: rows read, clusters, seconds, bytes.


@dataclass
class MultipoleStats:
    """Counts of the last prompt and of everything that was read after it. Numbers of tokens and rows are means.

    ``blocks`` of the model's ``blocks_all`` read clusters; means are over these, over rows of the batch and key-value
    heads, and, where they say so, over new tokens. ``tokens`` in the cache, ``clustered`` of them, in ``clusters``.
    For a new token ``kept`` of them were read exactly, and ``rows_read`` rows of keys, values and centroids in all,
    where its model would have read ``rows_dense``.

    ``prefill_seconds`` are the decoder's forwards that read a prompt, with its own attention. ``decode_steps`` forwards
    read clusters, in ``decode_seconds``, of which ``attention_seconds`` were attention (on a GPU, those in which it was
    launched). ``clustering_seconds`` are the first clustering, ``update_seconds`` the clustering of new tokens, which
    joined the clusters ``updates`` times a block; ``prompt_seconds`` of both were spent while a prompt was read.
    ``most_at_once`` is how many of the layers' blocks of keys were clustered for one of these forwards at most, a head
    or a row of one counted as its share. ``cache_bytes`` are keys and values of these blocks with the room to spare,
    ``cluster_bytes`` everything that belongs to the clusters.
    """

    settings: str = "multipole"
    min_tokens: int = 0
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
    prompt_seconds: float = 0.0
    most_at_once: float = 0.0
    decode_steps: int = 0
    decode_seconds: float = 0.0
    attention_seconds: float = 0.0
    cache_bytes: int = 0
    cluster_bytes: int = 0

    @property
    def decode_seconds_per_step(self) -> float:
        """Seconds of the decoder for a forward that reads clusters, updates inside, the first clustering left out."""
        late = max(0.0, self.clustering_seconds - self.prompt_seconds)
        return (self.decode_seconds - late) / self.decode_steps if self.decode_steps else 0.0

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
            why = f"fewer than min_tokens={self.min_tokens}" if self.tokens < self.min_tokens else "too few to cluster"
            return f"{head}, {self.tokens:g} tokens: {why}, all of them read exactly"
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
