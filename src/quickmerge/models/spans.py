"""Which tokens of a text belong together: words, or lines and sentences, as the tokenizer's pieces tell.

A merged token is gone for recall, and a number or a name of which half is merged is gone as a whole. So methods that
keep some tokens of a prompt keep spans: they ask for the number of the span that each token is of.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.models.load import FILES, noted_tokenizer
from quickmerge.models.tokenizers import BYTE_TOKEN, from_byte_level, load_tokenizer

__all__ = ["NO_SPACES", "UNITS", "Piece", "check_tokenizer", "cut", "pieces_of", "spans", "tokenizer_of", "within"]

UNITS = ("line", "word")
"""What a span may be: a line or sentence, or a word."""

LONG = 32
"""A line of this many tokens is cut in front of the next word."""

LONGEST = 40
"""No span has more tokens than this, but for those of one character."""

FEW = 4
"""Tokens of a word in a language that writes no spaces."""

ENDS = ".?!"
"""Marks that end a sentence where white space follows."""

WIDE_ENDS = "。！？…｡．"
"""Marks that end a sentence whatever follows."""

CLOSERS = "\"'”’»)]}」』）】》〉"
"""What may stand between the end of a sentence and the white space behind it."""

NO_END = re.compile(r"[(\[]?(\w|\d{1,3})\.|.*\s[A-Z]\.", re.DOTALL)
"""The number of an item, and the initial of a name: full stops behind which the sentence goes on."""

REPLACED = "\ufffd"
"""What a decoder writes for bytes that are no character, such as the first half of one."""


@dataclass(frozen=True)
class Piece:
    """What one token writes.

    ``text``: with the space in front of it. ``special``: it is a mark and no text. ``raw``: its bytes, where they are
    no whole characters and are known.
    """

    text: str
    special: bool = False
    raw: bytes | None = None


_PIECES: WeakKeyDictionary[Any, dict[int, Piece]] = WeakKeyDictionary()
"""What is known of each tokenizer's tokens by now: vocabularies are large, and a prompt has a few hundred tokens."""


def check_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer that is meant, that of a processor too; None for None.

    Raises:
        ValueError: it is neither.
    """
    found = getattr(tokenizer, "tokenizer", tokenizer)
    if found is not None and not all(callable(getattr(found, name, None)) for name in ("encode", "decode")):
        raise ValueError(
            f"tokenizer must be a tokenizer of transformers, or None for the model's own, got {tokenizer!r:.80}"
        )
    return found


def pieces_of(ids: Sequence[int], tokenizer: Any) -> list[Piece]:
    """What each of some tokens writes.

    The text of a token is what it adds behind another one, since many decoders drop a space at the start.
    """
    known = _PIECES.setdefault(tokenizer, {})
    missing = set(ids) - known.keys()
    if missing:
        special = _special(tokenizer)
        anchor, lead = _anchor(tokenizer)
        for each in sorted(missing):
            known[each] = Piece("", special=True) if each in special else _piece(tokenizer, each, anchor, lead)
    return [known[each] for each in ids]


def _special(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(each for each, token in added.items() if getattr(token, "special", False))}


def _written(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _anchor(tokenizer: Any) -> tuple[list[int], str]:
    """Tokens that others are decoded behind, and their text."""
    found = list(tokenizer.encode("a", add_special_tokens=False))[-1:]
    return found, _written(tokenizer, found)


def _piece(tokenizer: Any, token: int, anchor: list[int], lead: str) -> Piece:
    try:
        both = _written(tokenizer, [*anchor, token])
        text = both[len(lead) :] if both.startswith(lead) else _written(tokenizer, [token])
        name = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, OverflowError, TypeError, ValueError, KeyError):
        name = None
    if name is None:  # the model has rows that its tokenizer knows nothing of
        return Piece("", special=True)
    return Piece(text, raw=_raw(str(name)) if REPLACED in text else None)


def _raw(name: str) -> bytes | None:
    """The bytes of a token as its vocabulary writes it; None if it writes them in another way."""
    byte = BYTE_TOKEN.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else from_byte_level(name)


# Where spans begin ---------------------------------------------------------------------------------------------------


NO_SPACES = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x3000, 0x30FF),  # marks of Chinese and Japanese, kana
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0xFF00, 0xFFEF),
    (0x20000, 0x3FFFF),
)
"""Characters, first and last of each range, of scripts that set no spaces between words."""


def _writes_no_spaces(character: str) -> bool:
    """Whether a character is of a script that sets no spaces between words."""
    code = ord(character)
    return any(low <= code <= high for low, high in NO_SPACES)


def _line_begins(span: str, before: str, text: str, size: int) -> bool:
    """Whether a line or sentence begins with ``text``, behind ``before``, the last token of ``span`` of ``size``."""
    if "\n" in before:
        return text.strip("\r\n") != ""  # an empty line belongs to the one above
    said, begun = span.rstrip().rstrip(CLOSERS), text[:1]
    if said.endswith(tuple(WIDE_ENDS)) and begun not in (*WIDE_ENDS, *CLOSERS):
        return True
    spaced = begun.isspace() or before[-1:].isspace()
    if spaced and said.endswith(tuple(ENDS)) and not NO_END.fullmatch(said.strip()):
        return text.strip("\r\n") != ""
    return size >= LONG and (spaced or (begun != "" and _writes_no_spaces(begun)))


def _word_begins(span: str, before: str, text: str, size: int) -> bool:
    """The same for words."""
    if "\n" in before:
        return text.strip("\r\n") != ""
    if before.strip() == "" and before != "":
        return False  # a space of its own belongs to what follows it, such as digits
    if text[:1].isspace() or before[-1:].isspace():
        return text.strip("\r\n") != ""
    if text == "" or before == "" or not (_writes_no_spaces(before[-1]) and _writes_no_spaces(text[0])):
        return False
    return size >= FEW or (before[-1] in "，。、！？；：" and text[0] not in CLOSERS)


_RULES: dict[str, Callable[[str, str, str, int], bool]] = {"line": _line_begins, "word": _word_begins}


def _characters(pieces: Sequence[Piece]) -> tuple[list[str], list[bool]]:
    """The characters that each token completes, and whether it begins in the middle of one."""
    texts, inside = [], []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        inside.append(decoder.getstate()[0] != b"" or (piece.raw is None and piece.text.startswith(REPLACED)))
        if piece.raw is None:
            decoder.reset()
        texts.append(piece.text if piece.raw is None else decoder.decode(piece.raw))
    return texts, inside


def cut(pieces: Sequence[Piece], unit: str) -> list[int]:
    """The number of the span of each token of a text, rising from 0 by one.

    A ``line`` ends behind a line break, behind a mark that ends a sentence (in front of white space, but for those of
    languages without it), in front of a word where it has `LONG` tokens, and at the latest after `LONGEST`. A ``word``
    begins with white space, which belongs to it, and is cut after `FEW` tokens in a language without any. A special
    token is a span of its own, and no span begins in the middle of a character.

    Raises:
        QuickmergeError: for another unit.
    """
    if unit not in _RULES:
        raise QuickmergeError(f"spans must be one of {', '.join(UNITS)}, got {unit!r}{near_match(str(unit), UNITS)}")
    rule, (texts, inside) = _RULES[unit], _characters(pieces)
    # Of a token that only begins a character, what the following ones make of it.
    coming = list(texts)
    for i in range(len(texts) - 2, -1, -1):
        if texts[i] == "" and inside[i + 1]:
            coming[i] = coming[i + 1]
    found: list[int] = []
    span, before, size = "", "", 0
    for i, text in enumerate(texts):
        begins = i == 0 or pieces[i].special or pieces[i - 1].special
        if not begins and not inside[i]:
            begins = size >= LONGEST or rule(span, before, coming[i], size)
        found.append(found[-1] + begins if i else 0)
        span, size = (text, 1) if begins else ((span + text)[-LONGEST:], size + 1)
        before = text if text or begins else before
    return found


def spans(ids: Tensor, valid: Tensor, tokenizer: Any, unit: str) -> Tensor:
    """Which span each token of some texts belongs to.

    Args:
        ids: ``(B, N)``.
        valid: ``(B, N)`` bool, False for padding.
        tokenizer: that of the ids.
        unit: one of `UNITS`.

    Returns:
        ``(B, N)`` long, rising over the tokens of a row from 0 by one; -1 for padding.

    Raises:
        QuickmergeError: for another unit.
    """
    out = torch.full(ids.shape, -1, dtype=torch.long)
    for row, (given, there) in enumerate(zip(ids.tolist(), valid.cpu(), strict=True)):
        columns = there.nonzero().flatten()
        text = [given[column] for column in columns.tolist()]
        out[row, columns] = torch.tensor(cut(pieces_of(text, tokenizer), unit), dtype=torch.long)
    return out.to(ids.device)


def within(group: Tensor, *borders: Tensor) -> Tensor:
    """The same spans, cut wherever one of the masks ``borders (B, N)`` changes: ``(B, N)`` long, rising from 0."""
    begins = torch.ones_like(group, dtype=torch.bool)
    begins[:, 1:] = group[:, 1:] != group[:, :-1]
    for border in borders:
        begins[:, 1:] |= border[:, 1:] != border[:, :-1]
    return begins.long().cumsum(-1) - 1


# Whose tokens they are -----------------------------------------------------------------------------------------------


_FOUND: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""What `tokenizer_of` found of models that `quickmerge.load` did not make, None where there is none."""


def tokenizer_of(model: Any) -> Any:
    """The tokenizer of a model: that which `quickmerge.load` loaded with it, else the one in the model's own folder.

    That is ``model.name_or_path``, a local folder or a model in the hub's cache; nothing is fetched. Looked up once.

    Returns:
        The tokenizer, or None where none is known.
    """
    noted = noted_tokenizer(model)
    if noted is not None:
        return noted
    if model not in _FOUND:
        _FOUND[model] = _read(getattr(model, "name_or_path", None) or "")
    return _FOUND[model]


def _read(name: str) -> Any:
    folder = Path(name) if name else None
    if folder is not None and not folder.is_dir():
        folder = _cached(name)
    if folder is None or not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        return None
    try:
        return load_tokenizer(folder, progress=False)
    except QuickmergeError:
        return None  # a run says that none is known, and who gave an unusable one is told by its loader


def _cached(name: str) -> Path | None:
    """The folder of a model in the hub's cache."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES), local_files_only=True))
    except (OSError, ValueError):  # what the hub's client raises derives from these
        return None
