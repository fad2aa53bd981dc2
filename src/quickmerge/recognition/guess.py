"""What a recognizer says about an image: labels with their probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Guess", "check_share", "ranked"]


@dataclass(frozen=True)
class Guess:
    """A label, and its probability given the image; the separator that closes it counts."""

    label: str
    score: float


def ranked(found: Iterable[tuple[str, float]], k: int | None = None, minimum: float = 0.0) -> list[Guess]:
    """Labels with log-probabilities as guesses, most probable first.

    One label can be written in several tokens; the probabilities of the same text are summed. Empty text is left out.

    Args:
        found: text and log-probability of each token sequence.
        k: how many guesses at most, None for all.
        minimum: the least probability.
    """
    total: dict[str, float] = {}
    for label, log_p in found:
        if label:
            total[label] = total.get(label, 0.0) + math.exp(log_p)
    guesses = [Guess(label, score) for label, score in total.items() if score >= minimum]
    # ties by name, so that the order does not hang on the way that decoded them
    return sorted(guesses, key=lambda guess: (-guess.score, guess.label))[:k]


def check_share(name: str, value: object) -> None:
    """Raise ValueError unless ``value`` is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name} must be a number in [0, 1], got {value!r}")
