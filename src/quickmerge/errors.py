"""Make any text safe to show: valid UTF-8, no control characters.

What a model writes, a tokenizer splits or a file is called is untrusted. A terminal obeys the control characters in
it, and a page or an image may not hold them. Every text of others goes through here before it is shown.
"""

from __future__ import annotations

import difflib
import importlib
import math
import operator
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType

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
    "check_string",
    "clean",
    "clean_name",
    "door",
    "first_sentence",
    "half_character",
    "near_match",
    "need",
    "number_at_least",
    "whole_number",
]


_C0 = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_C1 = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_OTHER = {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
# C0 controls become their visible images (U+2400..), so a reader sees that something was there.
_TABLE = _C0 | _C1 | _OTHER
_BREAKS = re.compile(r"\r\n")
# In a name: line breaks, what turns the direction of reading, what can't be seen, and half characters.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff]"
)


def clean(value: object) -> str:
    """Return ``value`` as text that any terminal, UTF-8 file, HTML page or SVG image can hold.

    Tabs and newlines stay, other control characters become visible images such as U+2400, surrogate pairs
    are joined and lone surrogates become U+FFFD.
    """
    text = value if isinstance(value, str) else str(value)
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _BREAKS.sub("\n", joined).translate(_TABLE)


def clean_name(value: object) -> str:
    r"""Return a name or a message on one line, with whatever could hide or disguise a part of it as an escape.

    A file may be called ``gpj.\u202eexe``: shown as it is, it would read ``exe.jpg`` from the right. Controls of the
    direction of reading, invisible characters, control characters, line breaks and half characters are shown as
    ``\u202e``, the way a string of Python is written.
    """
    text = value if isinstance(value, str) else str(value)
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "surrogatepass")
    return _HIDDEN.sub(lambda found: _escape(ord(found[0])), joined)


def half_character(text: str) -> int | None:
    """Where a text has half of a surrogate pair, which is no text and which no tokenizer takes; None if nowhere.

    An argument that is no UTF-8 comes to Python with such halves in it, and JSON can hold them.
    """
    return next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)


def _escape(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# Every error that quickmerge raises on purpose, each told in one sentence.


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


def check_string(name: str, value: object) -> None:
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


# Packages that only some readers need.


def need(module: str, extra: str, what: str) -> ModuleType:
    """Import an optional package.

    Args:
        module: the name that is imported.
        extra: the extra of quickmerge that installs it.
        what: what cannot be read without it, as the beginning of a sentence.

    Raises:
        QuickmergeError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:  # it is there, and something that it needs is not
            raise
        package = module.replace("_", "-")
        raise QuickmergeError(
            f"{what} need the package {package}, which is not installed: pip install quickmerge[{extra}]"
        ) from None
