"""Which alphabet a tokenizer writes its vocabulary in: read from what its backend does, confirmed by trying it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.models.tokenizers import (
    BYTE_TOKEN,
    META_SPACE,
    from_byte_level,
    from_sentencepiece,
    from_wordpiece,
    roles_by_spelling,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Alphabet",
    "Token",
    "Vocabulary",
    "Writing",
    "find_writing",
    "is_marker",
    "is_reserved",
    "match_special",
    "read_vocabulary",
]


Alphabet = Literal["byte-level", "sentencepiece", "wordpiece"]

# Words, digits, punctuation, and letters of two bytes. Single spaces only: some tokenizers fold runs of them.
PROBES = ("Hello world", "the cat and the dog", "a 1 b 22", "it is (not) so, really: yes.", "déjà vu, naïve")
# that many tokens of the vocabulary itself are tried too, so that a tiny one is confirmed on words that it has
OWN_PROBES = 16


@dataclass(frozen=True)
class Writing:
    """How a vocabulary writes its tokens.

    Attributes:
        alphabet: `"byte-level"` (GPT-2, Llama 3, Qwen; tiktoken files once they are loaded), `"sentencepiece"` or
            `"wordpiece"`.
        space: the character for a space, in SentencePiece.
        byte_fallback: whether `<0xNN>` is a byte, in SentencePiece.
        prefix: what marks the continuation of a word, in WordPiece.
        isolated: WordPiece tokens that are cut off from their left neighbour wherever they stand.
    """

    alphabet: Alphabet
    space: str = META_SPACE
    byte_fallback: bool = False
    prefix: str = "##"
    isolated: frozenset[str] = frozenset()

    def spell(self, text: str) -> tuple[bytes | None, bool]:
        """The bytes that a token of the model's vocabulary stands for (None: it can't be told), and whether it
        continues a word without a mark in its bytes.
        """
        if self.alphabet == "byte-level":
            return from_byte_level(text), False
        if self.alphabet == "sentencepiece":
            return from_sentencepiece(text, space=self.space, byte_fallback=self.byte_fallback), False
        return from_wordpiece(text, prefix=self.prefix, spaced=text not in self.isolated)


def find_writing(backend: Tokenizer) -> Writing:
    """Tell how the vocabulary of a tokenizer is written.

    The parts of the backend (normalizer, pre-tokenizer, model, decoder) say what it could be. Then short texts are
    tokenized: the bytes of their tokens must be those of the text, up to a space in front (WordPiece: all spaces)
    and to what the normalizer changes. The name of the tokenizer's class is never asked: the same file opens as
    several of them.

    Raises:
        QuickmergeError: the parts tell of none of the alphabets, or the trial comes out otherwise.
    """
    parts: dict[str, Any] = json.loads(backend.to_str())
    guesses = list(_guesses(backend, parts))
    failures = [_failure(backend, parts, guess) for guess in guesses]
    for guess, failure in zip(guesses, failures, strict=True):
        if failure is None:
            return guess
    if failures:
        raise QuickmergeError(
            f"tokenizer can't be read as {guesses[0].alphabet}, which its parts tell of: {failures[0]}; allowed are "
            "byte-level, SentencePiece and WordPiece vocabularies whose tokens spell the text that they were cut from"
        )
    kinds = {name: [part["type"] for part in _parts(parts.get(name))] for name in ("model", "pre_tokenizer", "decoder")}
    told = ", ".join(f"{name} {'+'.join(types) or 'none'}" for name, types in kinds.items())
    raise QuickmergeError(
        f"tokenizer must be byte-level, SentencePiece or WordPiece, whose tokens tell where spaces are, got {told}"
    )


def _guesses(backend: Tokenizer, parts: dict[str, Any]) -> Iterator[Writing]:
    steps = [*_parts(parts.get("normalizer")), *_parts(parts.get("pre_tokenizer")), *_parts(parts.get("decoder"))]
    types = {step["type"] for step in steps}
    model = parts["model"]
    if "ByteLevel" in types:
        yield Writing("byte-level")
    if spaces := [space for step in steps if (space := _space(step))]:
        fallback = bool(model.get("byte_fallback")) or "ByteFallback" in types
        yield Writing("sentencepiece", space=spaces[0], byte_fallback=fallback)
    if model.get("type") == "WordPiece" or "WordPiece" in types:
        prefix = model.get("continuing_subword_prefix") or "##"
        plain = Writing("wordpiece", prefix=prefix)
        yield replace(plain, isolated=_isolated(backend, prefix))


def _parts(step: Any) -> Iterator[dict[str, Any]]:
    # `Sequence` holds its steps under another name in each of the places where there is one
    if not isinstance(step, dict):
        return
    inner = [value for key in ("normalizers", "pretokenizers", "decoders") for value in step.get(key) or []]
    if not inner:
        yield {"type": "unnamed", **step}
    for one in inner:
        yield from _parts(one)


def _space(step: dict[str, Any]) -> str | None:
    """The character that a step writes for a space, or reads as one."""
    if step["type"] == "Metaspace":
        return str(step.get("replacement") or META_SPACE)
    if step["type"] == "Replace":
        old, new = (step.get("pattern") or {}).get("String"), step.get("content")
        if old == " " and isinstance(new, str) and len(new) == 1:
            return new
        if new == " " and isinstance(old, str) and len(old) == 1:
            return old
    return None


def _isolated(backend: Tokenizer, prefix: str) -> frozenset[str]:
    if backend.pre_tokenizer is None:
        return frozenset()
    found = set()
    for text in backend.get_vocab(with_added_tokens=False):
        # a run of Latin letters or digits starts a word: most of the vocabulary needs no trial
        if not text or (text.isascii() and text.isalnum()) or text.startswith(prefix):
            continue
        pieces = [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(_normalized(backend, f"a{text}"))]
        if pieces == ["a", text]:
            found.add(text)
    return frozenset(found)


def _normalized(backend: Tokenizer, text: str) -> str:
    return text if backend.normalizer is None else str(backend.normalizer.normalize_str(text))


def _failure(backend: Tokenizer, parts: dict[str, Any], writing: Writing) -> str | None:
    """What goes wrong when texts are tokenized and spelled from their tokens; None if nothing does."""
    unknown = parts["model"].get("unk_token")
    if unknown is None and isinstance(parts["model"].get("unk_id"), int):
        unknown = backend.id_to_token(parts["model"]["unk_id"])
    added = {token.content for token in backend.get_added_tokens_decoder().values()} | {unknown}
    tried = 0
    for probe in (*PROBES, *_own_probes(backend, writing, added)):
        encoding = backend.encode(probe, add_special_tokens=False)
        # a backend may pad and cut off by itself
        tokens = [token for token, real in zip(encoding.tokens, encoding.attention_mask, strict=True) if real]
        if not tokens or encoding.overflowing or added & set(tokens):
            continue  # letters that it doesn't know
        spelled = b"".join(writing.spell(token)[0] or b"?" for token in tokens)
        expected = _expected(backend, writing, probe)
        if _plain(writing, spelled) != _plain(writing, expected):
            return f"{probe!r} is cut into {tokens}, which would spell {spelled!r}"
        tried += 1
    return None if tried else "it knows the letters of none of the texts that were tried"


def _own_probes(backend: Tokenizer, writing: Writing, added: set[str]) -> Iterator[str]:
    vocabulary = backend.get_vocab(with_added_tokens=False)
    words = []
    for text in sorted(vocabulary, key=lambda text: vocabulary[text]):
        data = None if text in added else writing.spell(text)[0]
        word = (data or b"").decode("utf-8", "replace").strip()
        if word.isalpha():
            words.append(word)
    step = max(1, len(words) // OWN_PROBES)
    chosen = words[::step]
    yield from chosen
    yield " ".join(chosen)


def _expected(backend: Tokenizer, writing: Writing, probe: str) -> bytes:
    text = _normalized(backend, probe)
    if writing.alphabet == "sentencepiece":
        text = text.replace(writing.space, " ")  # some write it in the normalizer already
    return text.encode()


def _plain(writing: Writing, data: bytes) -> bytes:
    return b"".join(data.split()) if writing.alphabet == "wordpiece" else data.lstrip(b" ")


# Special tokens: what they are, and which token of another vocabulary has the same job.
#
# Their vectors stand for a role in a conversation, not for text, so nothing that is known of text rebuilds them.


# <|im_start|>, DeepSeek's full-width bars, [INST] and [/INST], <think> and </think>
MARKER = re.compile(r"<\|.+\|>|<\uff5c.+\uff5c>|\[/?[A-Z][A-Z0-9_ ]*\]|</?[A-Za-z][A-Za-z0-9_.:-]*>")
RESERVED = re.compile(r"[\[<](?:unused|extra_id|reserved|control)_?\d+[\]>]|<\|(?:reserved_special_token|extra)_\d+\|>")
# Some vocabularies add these so that a table costs fewer tokens: they are text.
ELEMENTS = frozenset(
    {
        *("table", "caption", "thead", "tbody", "tfoot", "tr", "th", "td", "col", "colgroup"),
        *("h1", "h2", "h3", "h4", "h5", "h6", "p", "br", "hr", "div", "span", "pre", "blockquote", "code"),
        *("ul", "ol", "li", "dl", "dt", "dd", "a", "img", "sub", "sup", "b", "i", "u", "em", "strong", "small", "del"),
        *("html", "head", "body", "title", "script", "style", "link", "meta", "form", "input", "option", "select"),
    }
)
# The end of a text first: where one row must stand for several, it is the one that generation stops on.
MEANINGFUL = ("eos", "bos", "sep", "cls", "mask")
# What fills a batch or stands for what isn't known says nothing: it's taken only where nothing else tells.
FILLERS = ("unk", "pad")
# An encoder opens a text with cls and closes it with sep, as a decoder does with bos and eos.
COUSINS = {"cls": "bos", "bos": "cls", "sep": "eos", "eos": "sep"}


def is_marker(text: str) -> bool:
    """Whether an added token reads like a marker of a role (`<|user|>`, `[INST]`, `<think>`) and not like HTML."""
    return MARKER.fullmatch(text) is not None and text.strip("</>").lower() not in ELEMENTS


def is_reserved(text: str) -> bool:
    """Whether a token is an entry that was kept free (`<unused7>`, `[unused7]`, `<|reserved_special_token_7|>`)."""
    return RESERVED.fullmatch(text) is not None


def match_special(
    donor: Vocabulary,
    base: Vocabulary,
    special: Mapping[str, str] | None = None,
    *,
    base_tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[dict[int, tuple[int, ...]], tuple[int, ...]]:
    """Find for each special token of the donor the tokens of the base that do its job.

    The user's map wins. Next come roles: a token that is both bos and eos takes the base's eos and bos, in this order.
    Then the same text, if it is special in the base too. Then, where only one of the two vocabularies is an
    encoder's, its cls and sep and the other's bos and eos. The roles unk and pad come last, since whatever fills a
    batch is mostly another token in disguise.

    Args:
        donor: the vocabulary that is wanted.
        base: the vocabulary of the model.
        special: donor token and a text for it, which the base's tokenizer cuts into one or more tokens.
        base_tokenizer: cuts the texts of `special`; without it they must be single tokens of the base.

    Returns:
        The base ids of each donor id, several where one row should be made of several (their mean); and the donor ids
        that nothing was found for.

    Raises:
        QuickmergeError: `special` names a token that the donor lacks, or a text that the base has no tokens for.
    """
    asked = _asked(donor, base, special or {}, base_tokenizer)
    found: dict[int, tuple[int, ...]] = dict(asked)
    unmapped = []
    for token in donor.tokens:
        if not token.special or token.id in found:
            continue
        if ids := _by_role_or_text(token, donor, base):
            found[token.id] = ids
        else:
            unmapped.append(token.id)
    return dict(sorted(found.items())), tuple(unmapped)


def _by_role_or_text(token: Token, donor: Vocabulary, base: Vocabulary) -> tuple[int, ...]:
    roles = [role for role, one in donor.roles.items() if one == token.id]
    roles.sort(key=lambda role: MEANINGFUL.index(role) if role in MEANINGFUL else len(MEANINGFUL))
    if named := [base.roles[role] for role in roles if role in base.roles and role not in FILLERS]:
        return tuple(dict.fromkeys(named))
    twin = base.by_text.get(token.text)
    if twin is not None and twin.special:
        return (twin.id,)
    cousins = [COUSINS[role] for role in roles if role in COUSINS]
    if related := [base.roles[role] for role in cousins if role in base.roles]:
        return tuple(dict.fromkeys(related))
    return tuple(base.roles[role] for role in FILLERS if role in roles and role in base.roles)[:1]


def _asked(
    donor: Vocabulary,
    base: Vocabulary,
    special: Mapping[str, str],
    base_tokenizer: PreTrainedTokenizerBase | None,
) -> dict[int, tuple[int, ...]]:
    asked = {}
    for text, meaning in special.items():
        if text not in donor.by_text:
            known = [token.text for token in donor.tokens if token.special]
            shown = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
            raise QuickmergeError(
                f"special names {text!r}{near_match(text, known)}, which the donor's vocabulary lacks; "
                f"its special tokens are: {shown or 'none'}"
            )
        asked[donor.by_text[text].id] = _pieces(text, meaning, base, base_tokenizer)
    return asked


def _pieces(
    text: str, meaning: str, base: Vocabulary, base_tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int, ...]:
    if meaning in base.by_text and base.by_text[meaning].special:
        return (base.by_text[meaning].id,)
    if base_tokenizer is None:
        if meaning in base.by_text:
            return (base.by_text[meaning].id,)
        raise QuickmergeError(
            f"special maps {text!r} to {meaning!r}, which is no token of the base: give base_tokenizer too, to cut it"
        )
    pieces = tuple(int(one) for one in base_tokenizer.encode(meaning, add_special_tokens=False))
    if not pieces or base.roles.get("unk") in pieces:
        raise QuickmergeError(
            f"special maps {text!r} to {meaning!r}, but must map it to a text that the base's tokenizer knows "
            f"(it gives {len(pieces)} tokens{', unknown ones among them' if pieces else ''})"
        )
    return pieces


# The vocabulary of a tokenizer, each token spelled in bytes.


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
