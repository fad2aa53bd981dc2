"""Telling text files from others by how they begin."""

from __future__ import annotations

import codecs
from pathlib import Path

from quickmerge.errors import QuickmergeError

SNIFFED = 1 << 16
"""Bytes at the beginning of a file that tell text from binary data."""


def why_not_text(path: Path) -> str | None:
    """Say why a file does not look like text, from its first 64 KiB; None if it does.

    Raises:
        QuickmergeError: the file can't be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(SNIFFED)
    except OSError as error:
        raise QuickmergeError(f"{path} can't be read: {error.strerror}") from None
    if not start.strip():
        return "an empty file"
    if b"\0" in start:
        return "binary data"
    try:
        # a character may be cut in two where the beginning ends, but not where the file ends
        codecs.getincrementaldecoder("utf-8")().decode(start, final=len(start) < SNIFFED)
    except UnicodeDecodeError:
        return "other bytes than UTF-8"
    return None
