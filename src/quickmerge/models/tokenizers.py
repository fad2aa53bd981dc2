"""How vocabularies write bytes as text, and the way back: every token spelled in the bytes that it stands for.

Strings of two vocabularies can't be compared. Byte-level vocabularies write each byte as one printable character, so
that "è" there is the single byte 0xE8; SentencePiece writes text, with U+2581 for a space and `<0xNN>` for a byte, so
that "è" there is the two bytes of its UTF-8. WordPiece marks what continues a word and leaves spaces out. Bytes mean
the same everywhere.
"""

from __future__ import annotations

import re
from functools import cache

__all__ = [
    "BYTE_TOKEN",
    "META_SPACE",
    "from_byte_level",
    "from_sentencepiece",
    "from_wordpiece",
    "printable_bytes",
]


META_SPACE = "\u2581"
"""What SentencePiece writes for a space."""

BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""How SentencePiece writes a single byte of what it has no text token for."""


@cache
def printable_bytes() -> dict[str, int]:
    """The character that byte-level vocabularies write for each of the 256 bytes, with that byte.

    Bytes that are visible characters in Latin-1 write themselves; the others, in rising order, write the characters
    from U+0100 on.
    """
    # 0x7F-0xA0 are control characters and the hard space, 0xAD is the soft hyphen: none can be seen
    visible = [byte for byte in range(256) if 0x21 <= byte <= 0x7E or (byte >= 0xA1 and byte != 0xAD)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def from_byte_level(text: str) -> bytes | None:
    """The bytes of a byte-level token, or None where a character stands for no byte."""
    table = printable_bytes()
    try:
        return bytes(table[character] for character in text)
    except KeyError:
        return None


def from_sentencepiece(text: str, *, space: str = META_SPACE, byte_fallback: bool = True) -> bytes:
    """The bytes of a SentencePiece token.

    Args:
        text: as the vocabulary writes it.
        space: the character that stands for a space.
        byte_fallback: whether `<0xNN>` is a byte; where a vocabulary has no such tokens it is the text that one sees.
    """
    if byte_fallback and (byte := BYTE_TOKEN.fullmatch(text)):
        return bytes([int(byte[1], 16)])
    return text.replace(space, " ").encode("utf-8", "surrogatepass")


def from_wordpiece(text: str, *, prefix: str = "##", spaced: bool = True) -> tuple[bytes, bool]:
    """The bytes of a WordPiece token, and whether it continues a word.

    Args:
        text: as the vocabulary writes it.
        prefix: what marks a token that continues a word; such a token has no space before it.
        spaced: whether another token has a space before it. It does where a word starts; a token that is cut off
            from its left neighbour wherever it stands, such as a comma, says nothing of a space.
    """
    if prefix and text.startswith(prefix) and text != prefix:
        return text.removeprefix(prefix).encode("utf-8", "surrogatepass"), True
    return ((" " if spaced else "") + text).encode("utf-8", "surrogatepass"), False
