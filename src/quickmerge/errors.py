"""Every error that quickmerge raises on purpose, each told in one sentence."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

__all__ = [
    "CacheFolderError",
    "DamagedWeightsError",
    "FetchError",
    "PromptTooShortError",
    "QuickmergeError",
    "UnknownModelError",
    "UnknownReducerError",
    "UnsupportedModelError",
    "near_match",
    "number_at_least",
    "whole_number",
]


class QuickmergeError(ValueError):
    """Something that the caller gave or has cannot be used; the message says what, and what would do."""


class UnsupportedModelError(QuickmergeError):
    """The model exists but is of a kind that quickmerge cannot work on."""


class UnknownModelError(QuickmergeError):
    """The name is neither an embedded model, nor a model folder, nor a reachable hub id."""


class DamagedWeightsError(QuickmergeError):
    """A weights file is truncated, garbled or incomplete."""


class CacheFolderError(QuickmergeError):
    """The cache folder cannot be created or written."""


class FetchError(QuickmergeError):
    """Something that has to be downloaded could not be."""


class UnknownReducerError(QuickmergeError):
    """No reducer has this name."""


class PromptTooShortError(QuickmergeError):
    """The prompt leaves too few tokens to merge."""


def near_match(given: str, allowed: Iterable[str]) -> str:
    """Say which allowed word `given` was probably meant to be.

    Args:
        given: the word that was not understood.
        allowed: the words that would have been.

    Returns:
        `" (did you mean 'quickmerge'?)"` for the closest word, or `""` when none is close.
    """
    by_lower = {word.lower(): word for word in allowed}
    close = difflib.get_close_matches(given.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def whole_number(name: str, value: object, least: int = 1) -> None:
    """Raise ValueError unless ``value`` is a whole number of at least ``least``; ``name`` is what it was given for."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


def number_at_least(name: str, value: object, least: float) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least ``least``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= least):  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} must be a number of at least {least:g}, got {value!r}")
