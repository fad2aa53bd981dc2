"""At which depths tokens are reduced, and how far each time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from quickmerge.errors import as_index
from quickmerge.tokens.budget import Budget, Remaining, as_budget

FIRST_DEPTH = 4 / 15
"""Where the first merge goes by default, as a share of the depth: block 8 of 30."""

LAST_DEPTH = 5 / 6
"""Where the last merge goes by default: block 25 of 30. The blocks above it hardly read the prompt any more."""

LAST_DECAY = 0.15
"""What the default's last merge keeps of what the first one left."""


def layers_of(layer: int | Sequence[int]) -> tuple[Any, ...]:
    """One block or a list of blocks as a tuple, whole numbers as Python's own; anything else stays as it was given."""
    given = tuple(layer) if isinstance(layer, Sequence) else (layer,)
    return tuple(x if (index := as_index(x)) is None else index for x in given)


@dataclass(frozen=True)
class Stage:
    """One merge: before block ``layer``, down to ``keep`` of the original tokens (or what a budget says)."""

    layer: int
    keep: float | Budget


@dataclass(frozen=True)
class Schedule:
    """Merges before the given blocks, each keeping ``decay`` times the share of the one before.

    ``keep`` is the mean share of tokens that the blocks from the first merge on read, so every schedule with the
    same first block and the same ``keep`` costs the same. With stage s covering d_s blocks,
    ``keep_s = c * decay^s`` (at most 1) with c such that ``sum_s d_s keep_s = keep * sum_s d_s``. A budget that
    is no plain share (a count, an entropy) rules the first merge alone; each later one keeps ``decay`` of what is
    left by then.

    Args:
        layers: blocks that read a newly reduced sequence, rising.
        decay: in (0, 1]; 1 reduces once and leaves the later merges nothing to do.

    Raises:
        ValueError: if layers are not rising whole numbers of at least 1 or decay is out of range.
    """

    layers: tuple[int, ...]
    decay: float = 0.7

    def __post_init__(self) -> None:
        layers = [x for x in map(as_index, self.layers) if x is not None and x >= 1]
        rising = all(a < b for a, b in pairwise(layers))
        if not layers or len(layers) != len(self.layers) or not rising:
            raise ValueError(f"layer must be rising whole numbers of at least 1, got {list(self.layers)}")
        object.__setattr__(self, "layers", tuple(layers))
        if not (isinstance(self.decay, (int, float)) and 0 < self.decay <= 1):
            raise ValueError(f"decay must be a number in (0, 1], got {self.decay!r}")

    @classmethod
    def of(cls, layer: int | Sequence[int] | None, depth: int) -> Schedule:
        """The schedule a user means by ``layer`` in a model of ``depth`` blocks.

        None is the default: one merge early, where it saves most, and one near the top, where the prompt is hardly
        read any more.

        Raises:
            ValueError: if a block lies outside 1..depth-1.
        """
        if layer is None:
            first = min(depth - 1, max(1, math.floor(FIRST_DEPTH * depth + 0.5)))
            last = math.floor(LAST_DEPTH * depth + 0.5)
            return cls((first, last), LAST_DECAY) if first < last < depth else cls((first,))
        schedule = cls(layers_of(layer))
        schedule.check(depth)
        return schedule

    def check(self, depth: int) -> None:
        """Raise ValueError unless every block lies in 1..depth-1."""
        if self.layers[-1] > depth - 1:
            raise ValueError(f"layer must lie in 1..{depth - 1} for a model of {depth} blocks, got {self.layers[-1]}")

    def stages(self, keep: float | Budget, depth: int) -> list[Stage]:
        """The merges, for a share or budget ``keep``.

        Raises:
            ValueError: if ``keep`` is neither a number in (0, 1] nor a budget, or a block is out of range.
        """
        self.check(depth)
        as_budget(keep)
        if len(self.layers) == 1 or not isinstance(keep, (int, float)):
            return [Stage(self.layers[0], keep), *(Stage(layer, Remaining(self.decay)) for layer in self.layers[1:])]
        spans = [b - a for a, b in zip(self.layers, (*self.layers[1:], depth), strict=True)]
        shares = [self.decay**s for s in range(len(spans))]
        target = keep * sum(spans)
        # Shares above 1 are cut to 1 and what they leave over goes to the later stages, at most once per stage.
        keeps = [0.0] * len(spans)
        full = 0
        for full in range(len(spans) + 1):
            rest = target - sum(spans[:full])
            if full == len(spans):
                break
            scale = rest / sum(d * r for d, r in zip(spans[full:], shares[full:], strict=True))
            keeps = [1.0] * full + [scale * r for r in shares[full:]]
            if keeps[full] <= 1.0:
                break
        keeps = [min(1.0, k) for k in keeps] if full < len(spans) else [1.0] * len(spans)
        return [Stage(layer, k) for layer, k in zip(self.layers, keeps, strict=True)]
