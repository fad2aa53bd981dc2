"""Which tokens of a text are of literals: numbers, identifiers, paths, addresses, quoted text, whose every sign counts.

A sentence survives the loss of a word. A number, a key or a path of which one token is gone is another one, or none.

What a literal is, is a matter of spelling alone, so that a text of any language has some, and so that everybody can
see why. `literals` says it of characters, `literal_mask` of tokens. Both take time that grows with the text and no
faster, whatever the text.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from quickmerge.models.spans import NO_SPACES, Piece, pieces_of

__all__ = ["QUOTED", "is_literal", "literal_mask", "literal_tokens", "literals", "stretches"]

QUOTED = 64
"""Characters that quoted text has at most: longer ones are speech, of which words may go."""

SCHEME = 16
"""Characters in front of ``://`` at most, as in ``https``."""

BRACKETS = "()[]{}<>"
QUOTES = "\"'`´“”‘’«»‹›„‚"
MARKS = ";=|&*^!?…—"
"""With white space and commas, what ends a run of characters; a comma between two digits does not."""

END = ".:-–+~"
"""What is no part of a run where it stands at its end."""


def _class(ranges: Sequence[tuple[int, int]]) -> str:
    """The inside of a class of a regular expression for characters of these ranges, but for their digits."""
    found, begun = [], None
    for low, high in ranges:
        for code in range(low, high + 2):
            inside = code <= high and not (code < 0x20000 and chr(code).isdecimal())
            if inside and begun is None:
                begun = code
            elif not inside and begun is not None:
                found.append(f"\\U{begun:08x}-\\U{code - 1:08x}")
                begun = None
    return "".join(found)


_RUN = re.compile(rf"[^\s{re.escape(BRACKETS + QUOTES + MARKS)}{_class(NO_SPACES)}]+")
_COMMA = re.compile(r"(?<!\d),|,(?!\d)")
_ADDRESS = re.compile(rf"[^\s<>{re.escape(QUOTES)}]*")
_PAIRS = (('"', '"'), ("`", "`"), ("“", "”"), ("„", "“"), ("«", "»"), ("‹", "›"), ("‘", "’"))


def _quoted(opens: str, closes: str) -> str:
    """From a quote that nothing is written in front of to the next one that closes it, on one line."""
    own = rf"[^{opens}{closes}\\\n]|\\[^\n]"
    return rf"(?<!\w){opens}(?!\s)(?:{own}){{1,{QUOTED}}}(?<!\s){closes}(?!\w)"


# What apostrophes are stands inside of words.
_APOSTROPHE = rf"(?<!\w)'(?!\s)(?:[^'\\\n]|\\[^\n]|(?<=\w)'(?=\w)){{1,{QUOTED}}}(?<!\s)'(?!\w)"
_QUOTED = re.compile("|".join([*(_quoted(*pair) for pair in _PAIRS), _APOSTROPHE]))


def literals(text: str) -> list[tuple[int, int]]:
    """Where the literals of a text stand: first character and the one behind the last of each, rising, none in another.

    A literal is

    - *quoted text* of at most `QUOTED` characters on one line, its quotes included. Nothing but white space, brackets
      or marks stands in front of the first quote and behind the second, and no white space right inside of them;
    - *an address*: up to `SCHEME` letters and what follows ``://``, to the next white space, quote or angle bracket,
      without marks at its end;
    - *a run* of characters for which `is_literal`. Runs end at white space, brackets, quotes, `MARKS` and commas (but
      one between two digits), and at letters of scripts that set no spaces; marks at their ends are no part of them.
    """
    found = [match.span() for match in _QUOTED.finditer(text)]
    found += _addresses(text)
    for match in _RUN.finditer(text):
        start, stop = match.span()
        cuts = [start, *(at for comma in _COMMA.finditer(text, start, stop) for at in comma.span()), stop]
        for low, high in zip(cuts[::2], cuts[1::2], strict=True):
            run = text[low:high]
            # "://" and what stands in front of it is of an address.
            first = low + len(run) - len(run.lstrip(":"))
            last = low + len(run.rstrip(END))
            if first < last and is_literal(text[first:last]):
                found.append((first, last))
    return _united(found)


def is_literal(run: str) -> bool:
    """Whether a run of characters, without marks at its ends, must stay as it is.

    It must if it has a digit: numbers, dates, times, versions, hexadecimal keys, ``gpt2``. Or if it is spelled as names
    in programs and on machines are: an underscore inside or in front (``max_size``, ``__init__``), a capital behind a
    small letter (``QuickMerge``), a dot, ``@`` or ``::`` between letters (``os.path``, ``a@b.org``), but for initials
    (``e.g``); a backslash inside; several slashes, or one at an end (``/etc``, ``a/b/c``); ``--``, ``$``, ``@``, ``./``
    or ``~/`` in front of a letter.
    """
    letters = [_is_word(c) for c in run]
    if any(c.isdecimal() for c in run):
        return True
    if not any(letters):
        return False
    if any(a.islower() and b.isupper() for a, b in pairwise(run)):
        return True
    dunder = len(run) > 4 and run.startswith("__") and run.endswith("__")
    if dunder or "_" in run.strip("_") or (run.startswith("_") and not run.endswith("_")):
        return True
    if _joined(run, letters):
        return True
    if run.startswith(("--", "$", "@", "./", "~/")) and run.lstrip("-$@./~")[:1].isalpha():
        return True
    return "/" in run and (run.count("/") > 1 or run.startswith("/") or run.endswith("/"))


def _is_word(character: str) -> bool:
    return character.isalnum() or character == "_"


def _joined(run: str, letters: Sequence[bool]) -> bool:
    """Whether parts of a run are joined by what joins names."""
    inner = range(1, len(run) - 1)
    if "\\" in run.strip("\\") or any(run[i] == "@" and letters[i - 1] and letters[i + 1] for i in inner):
        return True
    if any(run[i : i + 2] == "::" and letters[i - 1] and i + 2 < len(run) and letters[i + 2] for i in inner):
        return True
    dotted = any(run[i] == "." and letters[i - 1] and letters[i + 1] for i in inner)
    return dotted and any(len(part) > 1 for part in run.split("."))


def _addresses(text: str) -> list[tuple[int, int]]:
    found, at = [], text.find("://")
    while at >= 0:
        start = at
        while start > max(0, at - SCHEME) and text[start - 1].isascii() and (
            text[start - 1].isalnum() or text[start - 1] in "+.-"
        ):  # fmt: skip
            start -= 1
        while start < at and not text[start].isalpha():
            start += 1
        match = _ADDRESS.match(text, at + 3)
        stop = at + 3 if match is None else match.end()
        end = _end(text, at + 3, stop)
        if start < at and end > at + 3:
            found.append((start, end))
        at = text.find("://", max(stop, at + 3))
    return found


def _end(text: str, start: int, stop: int) -> int:
    """Where an address ends: in front of marks, and of brackets that were not opened in it."""
    more = {
        closes: text.count(closes, start, stop) - text.count(opens, start, stop) for opens, closes in ("()", "[]", "{}")
    }
    while stop > start and (text[stop - 1] in ".,:;!?*|" or more.get(text[stop - 1], 0) > 0):
        stop -= 1
        if text[stop] in more:
            more[text[stop]] -= 1
    return stop


def _united(found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same characters, what overlaps as one."""
    out: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if out and start < out[-1][1]:
            out[-1] = (out[-1][0], max(out[-1][1], stop))
        else:
            out.append((start, stop))
    return out


# Of tokens -----------------------------------------------------------------------------------------------------------


def stretches(pieces: Sequence[Piece]) -> tuple[str, list[tuple[int, int]]]:
    """The text that tokens write, and from where to where in it each writes.

    A token that holds but part of a character is one of those that write it. A special token writes nothing, and a line
    break stands where it does, over which no literal goes.
    """
    text, size, found, waiting = [], 0, [], False
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if piece.raw is None:
            decoder.reset()
            waiting = False
            own = "\n" if piece.special else piece.text
        else:
            own = decoder.decode(piece.raw)
            waiting = decoder.getstate()[0] != b""
        found.append((size, size) if piece.special else (size, size + len(own) + waiting))
        text.append(own)
        size += len(own)
    return "".join(text), [(start, min(stop, size)) for start, stop in found]


def literal_tokens(pieces: Sequence[Piece]) -> list[int]:
    """Of each token the number of the literal that it overlaps, from 0 on; -1 for none. Of two it is the first."""
    text, places = stretches(pieces)
    spans = literals(text)
    found, at = [], 0
    for start, stop in places:
        while at < len(spans) and spans[at][1] <= start:
            at += 1
        found.append(at if at < len(spans) and spans[at][0] < stop else -1)
    return found


def literal_mask(ids: Tensor, valid: Tensor, tokenizer: Any) -> Tensor:
    """Which tokens of some texts overlap a literal.

    Args:
        ids: ``(B, N)``.
        valid: ``(B, N)`` bool, False for padding.
        tokenizer: that of the ids.

    Returns:
        ``(B, N)`` bool, on the device of ``ids``.
    """
    out = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (given, there) in enumerate(zip(ids.tolist(), valid.cpu(), strict=True)):
        columns = there.nonzero().flatten()
        pieces = pieces_of([given[column] for column in columns.tolist()], tokenizer)
        out[row, columns] = torch.tensor(literal_tokens(pieces), dtype=torch.long) >= 0
    return out.to(ids.device)
