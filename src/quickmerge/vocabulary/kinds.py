"""What sort of text a token is, so that quality can be told apart by it."""

from __future__ import annotations

import unicodedata
from typing import Literal, get_args

__all__ = ["KINDS", "Kind", "kind_of"]

Kind = Literal["word start", "continuation", "digits", "non-Latin", "code/punctuation/space"]
KINDS: tuple[str, ...] = get_args(Kind)


def kind_of(data: bytes) -> Kind:
    """The kind of a token by its bytes.

    - `"digits"`: digits only, after spaces.
    - `"non-Latin"`: some letter of another script, or a part of a character of several bytes.
    - `"word start"`: one space and Latin letters; an apostrophe or a hyphen may be among them.
    - `"continuation"`: the same without the space. A word at the start of a line looks like that too.
    - `"code/punctuation/space"`: all else, words glued to punctuation among them.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return "non-Latin"
    core = text.strip(" ")
    if core and all(character.isdecimal() for character in core):
        return "digits"
    letters = [character for character in core if unicodedata.category(character)[0] in "LM"]
    if any(not _is_latin(character) for character in letters):
        return "non-Latin"
    if letters and all(character in "'’-" or character in letters for character in core) and text in (core, " " + core):
        return "word start" if text.startswith(" ") else "continuation"
    return "code/punctuation/space"


def _is_latin(character: str) -> bool:
    # marks such as a combining accent belong to the letter before them
    return character.isascii() or unicodedata.name(character, "").startswith(("LATIN", "COMBINING"))
