"""Make any text safe to write: valid UTF-8, no control characters, no markup.

A prompt is untrusted input, and a tokenizer may hand over half a character (a lone surrogate) or raw bytes
such as NUL. Every text that reaches a report goes through this module.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

_C0 = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_C1 = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_OTHER = {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
# C0 controls become their visible pictures (U+2400..), so a reader sees that something was there.
_TABLE = _C0 | _C1 | _OTHER
_BREAKS = re.compile(r"\r\n")


def clean(value: object) -> str:
    """Return ``value`` as text that any UTF-8 file, HTML page or SVG picture can hold.

    Tabs and newlines stay, other control characters become visible pictures such as U+2400, surrogate pairs
    are joined and lone surrogates become U+FFFD.
    """
    text = value if isinstance(value, str) else str(value)
    joined = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _BREAKS.sub("\n", joined).translate(_TABLE)


def escape(value: object) -> str:
    """Return ``value`` cleaned and with every character that HTML gives a meaning to escaped."""
    return html.escape(clean(value), quote=True)


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
