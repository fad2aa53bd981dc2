"""What was measured of a recipe: its quality on somebody's documents, and from which length it pays on their machine.

It says what is known of a recipe and does nothing: two recipes are the same whatever was measured of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Self

from quickmerge.errors import QuickmergeError, near_match

__all__ = ["Measured", "PaysFrom", "Record"]

LONG = 1000
"""Characters of a text of it at most."""


@dataclass(frozen=True)
class Record:
    """One thing that was measured, as an entry of a recipe's file.

    ``entry`` is what the file calls it, and ``label`` the recipe that was measured.
    """

    entry: ClassVar[str]
    label: str

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Any) -> Self:
        """What `as_dict` gave.

        Raises:
            QuickmergeError: naming what is missing, unknown or out of range.
        """
        allowed = [field.name for field in fields(cls)]
        if not isinstance(data, Mapping):
            some = ", ".join(allowed[:3])
            raise QuickmergeError(f"{cls.entry} must be a table with {some} and so on, got {data!r:.80}")
        for name in data:
            if name not in allowed:
                raise QuickmergeError(f"{cls.entry} has the unknown entry {name!r:.80}{near_match(str(name), allowed)}")
        for field in fields(cls):
            if field.default is MISSING and field.name not in data:
                raise QuickmergeError(f"{cls.entry}.{field.name} is missing")
        try:
            return cls(**data)
        except QuickmergeError as error:
            raise QuickmergeError(f"{cls.entry}.{error}") from error


@dataclass(frozen=True)
class Measured(Record):
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

    entry: ClassVar[str] = "calibration"
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
        _check_texts(self, "label", "model", "score", "dtype", "texts", "quickmerge")
        _check_words(self, "held_out", "confident")
        _check_counts(self, documents=1, tokens=1, seed=None)
        _check_numbers(self, "floor", "value", "low", "high", "flops_ratio", "cache_ratio")

    def __str__(self) -> str:
        interval = "no interval" if self.low is None else f"{self.low:.3f} to {self.high:.3f}"
        held = " held-out" if self.held_out else ""
        by = " by the lower end" if self.confident else ""
        noun = "document" if self.documents == 1 else "documents"
        return (
            f"calibrated: {self.score} {self.value:.3f} ({interval}) on {self.documents}{held} {noun} of {self.tokens} "
            f"tokens, {self.model} in {self.dtype}; floor {self.floor:g}{by}"
        )


@dataclass(frozen=True)
class PaysFrom(Record):
    """Where merging begins to pay as a recipe remembers it: `quickmerge.break_even` has set its ``min_tokens`` to it.

    Args:
        label: of the recipe that was measured. Of another one this says nothing, and a recipe drops it.
        model: what the model is called.
        tokens: of the shortest prompt that was read faster merged.
        ratio: seconds of the plain prefill over those of the merged one at this length, the median.
        low, high: its quartiles.
        shortest, longest: lengths between which was looked.
        dtype: of the model.
        device: it was on.
        cpu: of the machine, and its cores.
        threads: of the CPU.
        quickmerge: the version that measured.

    Raises:
        QuickmergeError: naming what is none of these.
    """

    entry: ClassVar[str] = "break_even"
    model: str
    tokens: int
    ratio: float
    low: float
    high: float
    shortest: int
    longest: int
    dtype: str
    device: str
    cpu: str
    threads: int
    quickmerge: str

    def __post_init__(self) -> None:
        _check_texts(self, "label", "model", "dtype", "device", "cpu", "quickmerge")
        _check_counts(self, tokens=1, shortest=1, longest=1, threads=1)
        _check_numbers(self, "ratio", "low", "high")

    def __str__(self) -> str:
        noun = "thread" if self.threads == 1 else "threads"
        return (
            f"break-even: measured, merging pays from prompts of {self.tokens} tokens on ({self.ratio:.2f}x, quartiles "
            f"{self.low:.2f} to {self.high:.2f}), {self.model} in {self.dtype} on {self.device}, {self.cpu}, "
            f"{self.threads} {noun}"
        )


# What may stand in a file.


def _check_texts(given: Any, *names: str) -> None:
    for name in names:
        value = getattr(given, name)
        if not isinstance(value, str) or len(value) > LONG:
            raise QuickmergeError(f"{name} must be a text of at most {LONG} characters, got {value!r:.80}")


def _check_words(given: Any, *names: str) -> None:
    for name in names:
        if not isinstance(getattr(given, name), bool):
            raise QuickmergeError(f"{name} must be true or false, got {getattr(given, name)!r:.80}")


def _check_counts(given: Any, **least: int | None) -> None:
    for name, low in least.items():
        value = getattr(given, name)
        if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
            wanted = "a whole number" + ("" if low is None else f" of at least {low}")
            raise QuickmergeError(f"{name} must be {wanted}, got {value!r:.80}")


def _check_numbers(given: Any, *names: str) -> None:
    """Numbers that are finite; None where it is the default."""
    optional = {field.name for field in fields(given) if field.default is None}
    for name in names:
        value = getattr(given, name)
        if value is None and name in optional:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise QuickmergeError(f"{name} must be a finite number, got {value!r:.80}")
