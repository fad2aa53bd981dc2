"""What multipole attention can be told."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from quickmerge.errors import near_match, whole_number

__all__ = ["SELECTS", "SPACES", "Multipole"]

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
        queries: a forward of at most so many tokens on a filled cache reads clusters; a longer one reads a prompt, with
            the model's own attention.
        seed: for the draws of k-means.

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
    queries: int = 128
    seed: int = 0

    LEAST: ClassVar[dict[str, int]] = {
        "budget": 0,
        "query_position": 0,
        "sink": 0,
        "interval": 1,
        "block": 2,
        "iterations": 1,
        "update_iterations": 0,
        "first": 0,
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
        for name in ("replacement", "variance", "update"):
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
