"""Make any text safe to write: valid UTF-8, no control characters, no markup.

A prompt is untrusted input, and a tokenizer may hand over half a character (a lone surrogate) or raw bytes
such as NUL. Every text that reaches a report goes through this module; names go through `clean_name` first.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

from quickmerge.printable import clean as clean
from quickmerge.printable import clean_name as clean_name


def escape(value: object) -> str:
    """Return ``value`` cleaned and with every character that HTML gives a meaning to escaped."""
    return html.escape(clean(value), quote=True)


def escape_name(value: object) -> str:
    """Return ``value`` as `escape` does, with what could disguise a name shown as `clean_name` shows it.

    For what stands in a page as a label: line breaks stay.
    """
    return html.escape("\n".join(map(clean_name, clean(value).split("\n"))), quote=True)


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
