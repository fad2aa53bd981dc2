"""Tokenizers in SentencePiece's format (`tokenizer.model`), rebuilt for the `tokenizers` library and then compared."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import generate_merges, sentencepiece_available

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

__all__ = ["sentencepiece_tokenizer"]

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
