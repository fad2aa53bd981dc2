"""Make any text safe to write: valid UTF-8, no control characters, no markup.

A prompt is untrusted input, and a tokenizer may hand over half a character (a lone surrogate) or raw bytes
such as NUL. Every text that reaches a report goes through this module; names go through `clean_name` first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from quickmerge.errors import QuickmergeError
from quickmerge.errors import clean as clean
from quickmerge.errors import clean_name as clean_name


def shown_name(value: object) -> str:
    """Return ``value`` cleaned, with what could disguise a name shown as `clean_name` shows it.

    For what stands in a page as a label: line breaks stay.
    """
    return "\n".join(map(clean_name, clean(value).split("\n")))


def one_line(value: object, limit: int = 80) -> str:
    """Return ``value`` cleaned, on one line, cut to ``limit`` characters with an ellipsis."""
    text = clean(value).replace("\n", "↵").replace("\t", "⇥")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def listed(items: Sequence[str], limit: int = 8) -> str:
    """Return the first ``limit`` items, comma separated, with a count of the ones left out."""
    shown = ", ".join(items[:limit])
    rest = len(items) - limit
    return f"{shown} and {rest:,} more" if rest > 0 else shown


def split_lead(text: str) -> tuple[str, str]:
    """Split off the spaces before a word, so that a mark covers the word; a token of spaces only stays whole."""
    body = text.lstrip(" ")
    return (text[: len(text) - len(body)], body) if body else ("", text)


# Write numbers the way a reader wants them, and read them out of loose mappings without guessing.


NONE = "–"
_GAP = "\u00a0"  # a unit never stands on the next line


def number(values: Mapping[str, object], key: str) -> float | None:
    """Return ``values[key]`` as a finite float, or None where it is absent, None or not finite."""
    value = values.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise QuickmergeError(f"The report needs a number for {key!r}, not {value!r}.")
    result = float(value)
    return result if math.isfinite(result) else None


def count(value: float | None) -> str:
    """Return a whole number with thousands separators."""
    return NONE if value is None else f"{value:,.0f}"


def seconds(value: float | None, like: float | None = None) -> str:
    """Return a duration to three digits, in the unit that reads best for it, or for ``like`` beside which it stands."""
    if value is None:
        return NONE
    guide = value if like is None else like
    for limit, scale, unit in ((0.9995e-3, 1e6, "µs"), (0.9995, 1e3, "ms"), (math.inf, 1.0, "s")):
        if abs(guide) < limit:
            return f"{_digits(value * scale, guide * scale)}{_GAP}{unit}"
    raise QuickmergeError(f"The report cannot write {value!r} as a duration.")


def size(value: float | None) -> str:
    """Return a number of bytes in binary units."""
    if value is None:
        return NONE
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1023.5:
            return f"{value:.0f}{_GAP}B" if unit == "B" else f"{_digits(value)}{_GAP}{unit}"
        value /= 1024
    return f"{_digits(value)}{_GAP}TiB"


def percent(value: float | None) -> str:
    """Return a share as a percentage, with a decimal only where whole numbers would hide a difference."""
    if value is None:
        return NONE
    fine = 0 < abs(value) < 0.1 or 0 < abs(1 - value) < 0.01
    text = f"{100 * value:.{1 if fine else 0}f}%"
    return text.replace(".0%", "%").replace("-", "−")


def share(value: float | None) -> str:
    """Return a share that someone chose, such as 12.5%, without rounding it to a whole percent."""
    return NONE if value is None else f"{100 * value:.4g}%"


def times(value: float | None) -> str:
    """Return a factor such as 3.1×."""
    if value is None:
        return NONE
    return f"{value:.0f}×" if abs(value) >= 9.95 else f"{value:.1f}×" if abs(value) >= 0.95 else f"{value:.2f}×"


def loss(value: float | None) -> str:
    """Return a negative log-likelihood."""
    return NONE if value is None else f"{value:.3f}".replace("-", "−")


def change(before: float | None, after: float | None) -> str:
    """Return how much less or more ``after`` is than ``before``, in words."""
    if before is None or after is None or before <= 0 or after <= 0:
        return NONE
    ratio = before / after
    if 0.98 < ratio < 1.02:
        return "the same"
    factor = max(ratio, 1 / ratio)
    text = f"{factor:.2f}×" if factor < 1.1 else times(factor)
    return f"{text} {'less' if ratio > 1 else 'more'}"


def _digits(value: float, like: float | None = None) -> str:
    """Return ``value`` to three significant digits of ``like`` (itself), never in scientific notation."""
    guide = float(f"{abs(value if like is None else like):.3g}")  # 0.9999 counts as 1.00
    if guide == 0:
        return "0"
    places = min(3, max(0, 2 - math.floor(math.log10(guide))))
    return f"{value:,.{places}f}"
