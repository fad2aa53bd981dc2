"""Every error that quickmerge raises on purpose, each told in one sentence."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from quickmerge.printable import clean_name

__all__ = [
    "CacheFolderError",
    "DamagedWeightsError",
    "FetchError",
    "QuickmergeError",
    "QuickmergeWarning",
    "UnknownModelError",
    "UnknownReducerError",
    "UnsupportedModelError",
    "as_index",
    "check_text",
    "door",
    "first_sentence",
    "near_match",
    "number_at_least",
    "whole_number",
]


class QuickmergeError(ValueError):
    """Something that the caller gave or has cannot be used; the message says what, and what would do."""


class QuickmergeWarning(UserWarning):
    """Something that works, but perhaps not as was meant."""


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


@contextmanager
def door(what: str, kind: type[QuickmergeError] = QuickmergeError, remedy: str = "") -> Iterator[None]:
    """Tell in one sentence whatever another library raises over what a stranger's file holds.

    Put nothing into the block but the reading of that file: an error of our own would be taken for one of the file.
    Our own errors pass as they are, and so does what is nobody's fault: a broken pipe, an interruption.

    Args:
        what: the file, the field if it is known, and what can't be done with it, as ``"a/config.json can't be read"``.
        kind: the error to raise.
        remedy: what would help, as ``"copy it again"``.

    Raises:
        QuickmergeError: of that ``kind``, as ``"a/config.json can't be read (unexpected end of file): copy it again"``.
    """
    try:
        yield
    except (QuickmergeError, BrokenPipeError):
        raise
    except BaseException as error:
        # The tokenizers library panics with what is no Exception; everything else of that kind is meant to end us.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise kind(f"{what} ({first_sentence(error)}){': ' + remedy if remedy else ''}") from error


def first_sentence(error: BaseException) -> str:
    """What an error of another library says first, on one line and without control characters.

    The name of its type leads where its words alone say little, as the ``KeyError`` of a missing entry does.
    """
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    text = clean_name(" ".join(str(error).split())).split(". ")[0].rstrip(".")[:200].rstrip()
    if not text:
        return type(error).__name__
    bare = isinstance(error, (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError))
    return f"{type(error).__name__}: {text}" if bare else text


def near_match(given: str, allowed: Iterable[str]) -> str:
    """Say which allowed word `given` was probably meant to be.

    Args:
        given: the word that was not understood.
        allowed: the words that would have been.

    Returns:
        `" (did you mean 'quickmerge'?)"` for the closest word, or `""` when none is close.
    """
    by_lower = {word.lower(): word for word in allowed}
    close = difflib.get_close_matches(str(given).lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]!r}?)" if close else ""


def check_text(name: str, value: object) -> None:
    """Raise QuickmergeError unless ``value`` is a text of whole characters, which tokenizers and files can hold."""
    if not isinstance(value, str):
        raise QuickmergeError(f"{name} must be a text, got a {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise QuickmergeError(f"{name} must be a text of whole characters, got half of one in {value!r}") from None


def as_index(value: object) -> int | None:
    """``value`` as a Python int if it counts as a whole number, as those of numpy do and True and False don't."""
    if type(value) is int:
        return value
    # Arrays and tensors of truth values have an index too.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def whole_number(name: str, value: object, least: int = 1) -> int:
    """``value`` as a Python int; ``name`` is what it was given for.

    Raises:
        ValueError: unless it is a whole number (see `as_index`) of at least ``least``.
    """
    number = as_index(value)
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")
    return number


def number_at_least(name: str, value: object, least: float) -> None:
    """Raise ValueError unless ``value`` is a finite number of at least ``least``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= least):  # type: ignore[arg-type, operator]
        raise ValueError(f"{name} must be a number of at least {least:g}, got {value!r}")
