"""Opening a tokenizer without its model, and what its tokens stand for: bytes, and roles.

Strings of two vocabularies can't be compared. Byte-level vocabularies write each byte as one printable character, so
that "è" there is the single byte 0xE8; SentencePiece writes text, with U+2581 for a space and `<0xNN>` for a byte, so
that "è" there is the two bytes of its UTF-8. WordPiece marks what continues a word and leaves spaces out. Bytes mean
the same everywhere.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import (
    QuickmergeError,
    UnknownModelError,
    UnsupportedModelError,
    door,
    first_sentence,
    near_match,
)
from quickmerge.models.chat import templates_in
from quickmerge.models.download import cache_folder
from quickmerge.models.embedded import EMBEDDED, MODELS, SENTENCE_MODELS, TOKENIZERS
from quickmerge.models.folder import TEXT_BYTES, check_files
from quickmerge.models.load import hub_folder
from quickmerge.models.read import transformers_silenced, tried
from quickmerge.models.tokenizer_files import sentencepiece_tokenizer, tiktoken_tokenizer
from quickmerge.models.weights import check_regular, local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "BYTE_TOKEN",
    "META_SPACE",
    "from_byte_level",
    "from_sentencepiece",
    "from_wordpiece",
    "load_tokenizer",
    "printable_bytes",
    "roles_by_spelling",
]


BARE = ("tokenizer.json", "tokenizer.model", "*.tiktoken", "*.model")
ALLOWED = (
    "a folder with a tokenizer.json, a tokenizer.json, a SentencePiece tokenizer.model, a tiktoken file, "
    f"an embedded name ({', '.join([*MODELS, *SENTENCE_MODELS, *TOKENIZERS])}) or a hub id such as owner/name"
)


def load_tokenizer(
    source: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that the `tokenizers` library runs; no weights are read.

    Args:
        source: an embedded name (a model's, or one of `quickmerge.models.embedded.TOKENIZERS`), a folder of a model
            or of a tokenizer, a hub id (`"owner/name"`), or a file: a `tokenizer.json`, a SentencePiece
            `tokenizer.model` (needs the package sentencepiece) or one in tiktoken's format.
        pattern: the regular expression of a word, for a tiktoken file, which doesn't hold it; None means that of
            Llama 3 and cl100k.
        cache_dir: where embedded models are kept; None means `$QUICKMERGE_CACHE`, else the user's cache folder.
        progress: whether to show on stderr what goes on.

    Returns:
        The tokenizer as its files say. Where there is but one file, special tokens have the roles that they are
        usually spelled for.

    Raises:
        UnknownModelError: there is no such thing, or the hub can't be reached.
        UnsupportedModelError: it isn't a tokenizer, or not one that the `tokenizers` library runs.
        CacheFolderError: the cache folder can't be written.
        FetchError: an embedded one could not be downloaded.
        DamagedWeightsError: an embedded one is not what was published.
        QuickmergeError: `pattern` can't be used.
    """
    name = os.fspath(source)
    path = local_path("tokenizer", name, UnknownModelError) if name else Path()
    if name in TOKENIZERS or name in MODELS or name in SENTENCE_MODELS:
        path = EMBEDDED[name].prepare(cache_folder(cache_dir), progress=progress)
    folder = path if name and path.is_dir() else None
    if folder is not None:
        path = _in_folder(folder)
    if pattern is not None and not _is_tiktoken(path):
        raise QuickmergeError(f"pattern is for a tiktoken file, which doesn't say how words are found; got {name}")
    if not name or not path.exists():
        _check_hub_id(name)
    with transformers_silenced():
        tokenizer = _read(name, path, pattern)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise UnsupportedModelError(
            f"{name} has a {type(tokenizer).__name__}, which runs in Python alone: give {ALLOWED}"
        )
    if folder is not None and tokenizer.chat_template is None:
        tokenizer.chat_template = templates_in(folder)
    return tokenizer


def _in_folder(folder: Path) -> Path:
    """The folder itself if it says what its tokenizer is, else the one file in it."""
    if any((folder / name).is_file() for name in ("tokenizer_config.json", "config.json")):
        return folder
    found = next((path for name in BARE for path in sorted(folder.glob(name))), None)
    if found is None:
        raise UnknownModelError(f"the folder {folder} holds no tokenizer (tokenizer.json): give {ALLOWED}")
    return found


def _check_hub_id(name: str) -> None:
    # a hub id is exactly owner/name; whatever else has a slash was meant as a path
    owner, slash, rest = name.partition("/")
    if not slash or owner in ("", ".", "..", "~") or not rest or "/" in rest:
        names = [*MODELS, *SENTENCE_MODELS, *TOKENIZERS]
        raise UnknownModelError(f"there is no tokenizer {name!r}{near_match(name, names)}: give {ALLOWED}")


def _read(name: str, path: Path, pattern: str | None) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if path.is_file():
        return _read_file(path, pattern)
    if not path.is_dir():
        path = hub_folder(name, weights=False)
    check_files(path)
    try:
        tokenizer: PreTrainedTokenizerBase = tried(AutoTokenizer.from_pretrained(str(path), trust_remote_code=False))
    except Exception as error:  # transformers raises whatever its parsers raise
        if path.is_dir() and (path / "tokenizer.json").is_file():
            return _read_file(path / "tokenizer.json", None)
        if path.is_dir():
            raise UnsupportedModelError(f"{path} has no usable tokenizer ({first_sentence(error)})") from error
        raise UnknownModelError(
            f"the hub has no tokenizer {name!r} that can be reached from here ({first_sentence(error)}): "
            f"check the id and the connection, or give {ALLOWED}"
        ) from error
    return tokenizer


def _read_file(path: Path, pattern: str | None) -> PreTrainedTokenizerBase:
    check_regular(path, TEXT_BYTES)
    with door(f"{path} holds no usable tokenizer", UnsupportedModelError):
        if _is_json(path):
            return tried(_read_json(path))
        if _is_tiktoken(path):
            return tried(tiktoken_tokenizer(path, pattern=pattern))
        return tried(sentencepiece_tokenizer(path))


def _read_json(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), clean_up_tokenization_spaces=False)
    except Exception as error:  # the parser raises a bare Exception
        raise UnsupportedModelError(
            f"{path} is not a tokenizer.json of the tokenizers library ({first_sentence(error)})"
        ) from error
    return _with_roles(tokenizer)


def _with_roles(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    flagged = [
        token.content for token in tokenizer.backend_tokenizer.get_added_tokens_decoder().values() if token.special
    ]
    for role, text in roles_by_spelling(flagged).items():
        if getattr(tokenizer, f"{role}_token") is None:
            setattr(tokenizer, f"{role}_token", text)
    return tokenizer


def _is_json(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{")


def _is_tiktoken(path: Path) -> bool:
    """Whether a file starts with a line of base64 and a number."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.readline(4096).split()
    return len(first) == 2 and first[1].isdigit() and first[0].isascii() and first[0].rstrip(b"=").isalnum()


# What tokens are for, and which bytes they stand for.


SPELLINGS = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>"),
    "eos": ("</s>", "<eos>", "<|endoftext|>", "<|end_of_text|>"),
    "unk": ("<unk>", "[UNK]"),
    "pad": ("<pad>", "[PAD]"),
    "cls": ("[CLS]",),
    "sep": ("[SEP]",),
    "mask": ("[MASK]", "<mask>"),
}


def roles_by_spelling(texts: Iterable[str]) -> dict[str, str]:
    """The roles that special tokens have by the way they are usually spelled.

    Args:
        texts: the special tokens of a tokenizer.

    Returns:
        Role (`"bos"`, `"eos"`, `"unk"`, `"pad"`, `"cls"`, `"sep"`, `"mask"`) and text, for the roles that are found.
    """
    given = set(texts)
    found = {role: next((text for text in usual if text in given), None) for role, usual in SPELLINGS.items()}
    return {role: text for role, text in found.items() if text is not None}


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
