"""The vocabulary of a tokenizer, each token spelled in bytes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.alphabets import BYTE_TOKEN
from quickmerge.vocabulary.special import is_marker, is_reserved, roles_by_spelling
from quickmerge.vocabulary.writing import Alphabet, Writing, find_writing

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["Token", "Vocabulary", "read_vocabulary"]


@dataclass(frozen=True)
class Token:
    """One entry of a vocabulary.

    Attributes:
        id: its place in the embedding matrix.
        text: as the vocabulary writes it.
        data: the bytes that it stands for, a leading space being `b" "`; None for a special token, and for one that
            stands for no bytes or for bytes that can't be told.
        continuation: WordPiece's `##x`, which joins the word before it.
        special: it stands for a role, not for text.
        added: it is cut out of the text before the model of the tokenizer sees it.
        byte: SentencePiece's `<0xNN>`, a single byte.
    """

    id: int
    text: str
    data: bytes | None
    continuation: bool = False
    special: bool = False
    added: bool = False
    byte: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """All tokens of a tokenizer.

    Attributes:
        tokens: by rising id; ids that nothing is written under are absent.
        alphabet: how the texts are written: `"byte-level"`, `"sentencepiece"` or `"wordpiece"`. A tiktoken file is
            byte-level once it is loaded.
        size: largest id + 1.
        lower_cased: whether the tokenizer makes text lower case before it cuts it.
        roles: `"bos"`, `"eos"`, `"unk"`, `"pad"`, ... and the id of the token; a token may have several roles.
        left_out: plain tokens whose bytes can't be told, and why.
    """

    tokens: tuple[Token, ...]
    alphabet: Alphabet
    size: int
    lower_cased: bool
    roles: dict[str, int]
    left_out: dict[int, str] = field(default_factory=dict)

    @cached_property
    def by_id(self) -> dict[int, Token]:
        """The tokens under their ids."""
        return {token.id: token for token in self.tokens}

    @cached_property
    def by_text(self) -> dict[str, Token]:
        """The tokens under what the vocabulary writes for them."""
        return {token.text: token for token in self.tokens}

    def spell(self, ids: Iterable[int]) -> bytes | None:
        """The bytes that tokens stand for together, or None if one of them stands for none.

        It is the text's UTF-8, after the tokenizer's normalizer: up to a leading space that SentencePiece adds, and
        in WordPiece with one space before every word.
        """
        pieces = [self.by_id[one].data for one in ids]
        return None if None in pieces else b"".join(piece for piece in pieces if piece is not None)


def read_vocabulary(tokenizer: PreTrainedTokenizerBase) -> Vocabulary:
    """Read the vocabulary of a tokenizer and spell its tokens in bytes.

    A token is special if the tokenizer flags it so or names a role for it. An added token that isn't flagged is
    special if it reads like a marker (`<|im_start|>`, `<tool_call>`, `[INST]`): tokenizers leave such markers
    unflagged so that they show in what is decoded, and their vectors mean a role all the same. Added HTML elements
    (`<td>`) and added words and runs of spaces are text. Reserved entries (`<unused7>`, `[unused7]`) are special
    wherever they stand: no text is ever cut into them.

    Roles that the tokenizer doesn't name are taken from the usual spellings (`<s>`, `[CLS]`, ...), so that a bare
    `tokenizer.json` gives what it gives through the class that was made for it.

    Args:
        tokenizer: one of transformers with a backend of the `tokenizers` library.

    Raises:
        QuickmergeError: it has no such backend, or its vocabulary is written in no alphabet that is known.
    """
    backend = _backend(tokenizer)
    writing = find_writing(backend)
    added = backend.get_added_tokens_decoder()
    in_model = backend.get_vocab(with_added_tokens=False)
    ids = sorted({*in_model.values(), *added})
    named = {name.removesuffix("_token"): text for name, text in tokenizer.special_tokens_map.items() if _is_text(text)}
    flagged = {text for one, token in added.items() if token.special for text in [token.content]}
    flagged |= {str(text) for text in tokenizer.all_special_tokens}
    roles = {**roles_by_spelling(flagged), **named}
    unknown = getattr(backend.model, "unk_token", None)
    if unknown in flagged:
        roles.setdefault("unk", str(unknown))
    texts = {one: str(backend.id_to_token(one)) for one in ids}
    special = {one for one, text in texts.items() if text in flagged or is_reserved(text)}
    special |= {one for one, token in added.items() if is_marker(token.content)}
    if writing.byte_fallback:  # some files flag these, which stand for a byte of text and nothing else
        special -= {one for one in special if BYTE_TOKEN.fullmatch(texts[one])}
    tokens, left_out = [], {}
    for one, text in texts.items():
        token = _token(one, text, writing, special=one in special, added=one in added, in_model=text in in_model)
        tokens.append(token)
        if token.data is None and not token.special:
            left_out[one] = "it stands for no bytes" if not text else "it holds characters that stand for no byte"
    by_text = {text: one for one, text in texts.items()}
    return Vocabulary(
        tokens=tuple(tokens),
        alphabet=writing.alphabet,
        size=ids[-1] + 1,
        lower_cased=backend.normalizer is not None and backend.normalizer.normalize_str("ABC").endswith("abc"),
        roles={role: by_text[text] for role, text in roles.items() if text in by_text},
        left_out=left_out,
    )


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    backend: Tokenizer | None = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise QuickmergeError(
            f"tokenizer must be one that the tokenizers library runs (with a tokenizer.json), "
            f"got a {type(tokenizer).__name__}"
        )
    if not backend.get_vocab_size():
        raise QuickmergeError(f"tokenizer must have a vocabulary, got an empty {type(tokenizer).__name__}")
    return backend


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _token(one: int, text: str, writing: Writing, *, special: bool, added: bool, in_model: bool) -> Token:
    if special:
        return Token(one, text, None, special=True, added=added)
    if added and not in_model:
        # cut out of the text itself, so written as it is
        return Token(one, text, text.encode() or None, added=True)
    data, continuation = writing.spell(text)
    byte = writing.alphabet == "sentencepiece" and data is not None and len(data) == 1 and len(text) == len("<0x00>")
    return Token(one, text, data or None, continuation=continuation, added=added, byte=byte)
