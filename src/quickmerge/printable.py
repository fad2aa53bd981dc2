"""Make any text safe to show: valid UTF-8, no control characters.

What a model writes, a tokenizer splits or a file is called is untrusted. A terminal obeys the control characters in
it, and a page or a picture may not hold them. Every text of others goes through here before it is shown.
"""

from __future__ import annotations

import re

__all__ = ["clean", "clean_name", "half_character"]

_C0 = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_C1 = dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
_OTHER = {0x7F: 0x2421, 0xFFFE: 0xFFFD, 0xFFFF: 0xFFFD}
# C0 controls become their visible pictures (U+2400..), so a reader sees that something was there.
_TABLE = _C0 | _C1 | _OTHER
_BREAKS = re.compile(r"\r\n")
# In a name: line breaks, what turns the direction of reading, what can't be seen, and half characters.
_HIDDEN = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff]"
)


def clean(value: object) -> str:
    """Return ``value`` as text that any terminal, UTF-8 file, HTML page or SVG picture can hold.

    Tabs and newlines stay, other control characters become visible pictures such as U+2400, surrogate pairs
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
