"""Which alphabet a tokenizer writes its vocabulary in: read from what its backend does, confirmed by trying it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.alphabets import META_SPACE, from_byte_level, from_sentencepiece, from_wordpiece

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Alphabet", "Writing", "find_writing"]

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
