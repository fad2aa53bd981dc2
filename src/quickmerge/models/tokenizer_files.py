"""Tokenizers in single files of other programs: SentencePiece's `tokenizer.model`, and tiktoken's ranks."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.compat import generate_merges, sentencepiece_available

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["read_ranks", "sentencepiece_tokenizer", "tiktoken_tokenizer"]


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
