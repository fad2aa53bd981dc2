"""What a recipe was calibrated by: a floor, and what was measured of the recipe on somebody's documents.

It says what is known of a recipe and does nothing: two recipes are the same whatever was measured of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

from quickmerge.errors import QuickmergeError, near_match

__all__ = ["Measured"]

LONG = 1000
"""Characters of a text of it at most."""


@dataclass(frozen=True)
class Measured:
    """A calibration as a recipe remembers it, without dates or places.

    Args:
        label: of the recipe that was measured. Of another one this says nothing, and a recipe drops it.
        model: what the model is called.
        score: what was measured: ``recovery``, ``literals`` or names of tasks.
        floor: that the score was to stay above.
        value: the score, as a share of the plain model's.
        low, high: its 95 % interval over documents; None where they were too few.
        documents: how many it is of.
        held_out: whether these had no part in choosing ``keep``.
        confident: whether ``low`` had to stay above the floor, and not only ``value``.
        tokens: of each document's context.
        dtype: of the model.
        texts: the first 16 digits of a sha256 over the documents.
        seed: by which they were divided.
        quickmerge: the version that measured.
        flops_ratio: FLOPs of reading them over the plain model's; None where they can't be counted.
        cache_ratio: bytes of the cache over the plain model's.

    Raises:
        QuickmergeError: naming what is none of these.
    """

    label: str
    model: str
    score: str
    floor: float
    value: float
    documents: int
    held_out: bool
    confident: bool
    tokens: int
    dtype: str
    texts: str
    seed: int
    quickmerge: str
    low: float | None = None
    high: float | None = None
    flops_ratio: float | None = None
    cache_ratio: float | None = None

    def __post_init__(self) -> None:
        for name in ("label", "model", "score", "dtype", "texts", "quickmerge"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > LONG:
                raise QuickmergeError(f"{name} must be a text of at most {LONG} characters, got {value!r:.80}")
        for name in ("held_out", "confident"):
            if not isinstance(getattr(self, name), bool):
                raise QuickmergeError(f"{name} must be true or false, got {getattr(self, name)!r:.80}")
        for name, least in (("documents", 1), ("tokens", 1), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
                wanted = "a whole number" + ("" if least is None else f" of at least {least}")
                raise QuickmergeError(f"{name} must be {wanted}, got {value!r:.80}")
        for name in ("floor", "value", "low", "high", "flops_ratio", "cache_ratio"):
            value = getattr(self, name)
            if value is None and name not in ("floor", "value"):
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise QuickmergeError(f"{name} must be a finite number, got {value!r:.80}")

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> Measured:
        """What `as_dict` gave.

        Raises:
            QuickmergeError: naming what is missing, unknown or out of range.
        """
        allowed = [f.name for f in fields(cls)]
        if not isinstance(data, Mapping):
            raise QuickmergeError(
                f"calibration must be a table with {', '.join(allowed[:3])} and so on, got {data!r:.80}"
            )
        for name in data:
            if name not in allowed:
                raise QuickmergeError(f"calibration has the unknown entry {name!r:.80}{near_match(str(name), allowed)}")
        for field in fields(cls):
            if field.default is MISSING and field.name not in data:
                raise QuickmergeError(f"calibration.{field.name} is missing")
        try:
            return cls(**data)
        except QuickmergeError as error:
            raise QuickmergeError(f"calibration.{error}") from error

    def __str__(self) -> str:
        interval = "no interval" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        held = " held-out" if self.held_out else ""
        by = " by the lower end" if self.confident else ""
        noun = "document" if self.documents == 1 else "documents"
        return (
            f"calibrated: {self.score} {self.value:.3f} ({interval}) on {self.documents}{held} {noun} of {self.tokens} "
            f"tokens, {self.model} in {self.dtype}; floor {self.floor:g}{by}"
        )
