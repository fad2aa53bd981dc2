"""Vocabularies in bytes: whatever text is cut, its tokens spell it."""

from __future__ import annotations

import re
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import SENTENCES, byte_level, from_words, sentencepiece_bpe, unigram, wordpiece, wrap
from tokenizers import AddedToken, Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.matching import match
from quickmerge.transplant.tokens import read_vocabulary

KNOWN = sorted({character for sentence in SENTENCES for character in sentence})
texts = st.text(max_size=40) | st.lists(st.sampled_from([*SENTENCES, "  ", "\n\n", "猫", "12", "🦊"]), max_size=4).map(
    "".join
)


def spelled(tokenizer: PreTrainedTokenizerFast, text: str) -> bytes | None:
    ids = tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return read_vocabulary(tokenizer).spell(ids)


@settings(max_examples=40, deadline=None)
@given(texts)
def test_byte_level_tokens_spell_any_text(text: str) -> None:
    assert spelled(byte_level(), text) == text.encode()


@settings(max_examples=40, deadline=None)
@given(texts, st.sampled_from(["prepend", "metaspace"]))
def test_sentencepiece_tokens_spell_any_text_behind_one_space(text: str, way: str) -> None:
    tokenizer = sentencepiece_bpe(way=way)
    # a text that writes the mark of a space, or a byte, as such can't be told from one that has it
    text = text.replace("▁", "")
    if not text:
        assert spelled(tokenizer, text) in (b"", b" ")
        return
    expected = {b" " + text.encode(), text.encode()} if way == "metaspace" else {b" " + text.encode()}
    assert spelled(tokenizer, text) in expected


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from(KNOWN), min_size=1, max_size=40))
def test_unigram_tokens_spell_the_normalized_text(text: str) -> None:
    known = re.sub(" {2,}", " ", unicodedata.normalize("NFKC", text))
    found = spelled(unigram(), text)
    if found is not None:  # a letter that it gave up
        assert found.lstrip(b" ") == known.lstrip(" ").encode()


@settings(max_examples=40, deadline=None)
@given(st.text(st.sampled_from(KNOWN), min_size=1, max_size=40), st.booleans())
def test_wordpiece_tokens_spell_the_text_up_to_spaces(text: str, lowercase: bool) -> None:
    tokenizer = wordpiece(lowercase)
    normalized = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    found = spelled(tokenizer, text)
    if found is not None:
        assert b"".join(found.split()) == "".join(normalized.split()).encode()


def test_a_space_marks_the_start_of_a_word_in_wordpiece() -> None:
    assert spelled(wordpiece(), "The cat, and the dog.") == b" the cat, and the dog."
    vocabulary = read_vocabulary(wordpiece())
    assert vocabulary.lower_cased
    assert not read_vocabulary(wordpiece(lowercase=False)).lower_cased
    assert all(token.continuation == token.text.startswith("##") for token in vocabulary.tokens if not token.special)


def test_what_a_vocabulary_says_of_itself() -> None:
    vocabulary = read_vocabulary(sentencepiece_bpe())
    assert (vocabulary.alphabet, vocabulary.lower_cased, vocabulary.left_out) == ("sentencepiece", False, {})
    assert vocabulary.roles == {"unk": 0, "bos": 1, "eos": 2}
    assert [token.text for token in vocabulary.tokens if token.special] == ["<unk>", "<s>", "</s>"]
    assert [token.id for token in vocabulary.tokens] == list(range(vocabulary.size))
    newline = vocabulary.by_text["<0x0A>"]
    assert (newline.data, newline.byte, newline.special) == (b"\n", True, False)
    assert sum(token.byte for token in vocabulary.tokens) == 256
    assert not vocabulary.by_text["▁"].byte


def test_bytes_are_text_even_where_they_are_flagged() -> None:
    plain = sentencepiece_bpe()
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.add_special_tokens(["<0x41>", "<0x0A>"])
    vocabulary = read_vocabulary(wrap(backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"))
    assert vocabulary.by_text["<0x0A>"].data == b"\n"
    assert not vocabulary.by_text["<0x0A>"].special
    assert match(vocabulary, read_vocabulary(plain)).shared.tolist() == [
        [one, one] for one in range(3, vocabulary.size)
    ]


def test_roles_of_a_bare_file_are_those_that_it_is_spelled_for() -> None:
    named = sentencepiece_bpe()
    bare = wrap(Tokenizer.from_str(named.backend_tokenizer.to_str()))
    assert bare.eos_token is None
    assert read_vocabulary(bare) == read_vocabulary(named)


def test_one_token_keeps_all_its_roles() -> None:
    tokenizer = wrap(Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    for role in ("bos", "eos", "pad"):
        setattr(tokenizer, f"{role}_token", "<|endoftext|>")
    assert read_vocabulary(tokenizer).roles == {"bos": 0, "eos": 0, "pad": 0}


def test_which_added_tokens_are_special() -> None:
    tokenizer = from_words(
        {"Ġthe": 0, "Ġcat": 1, "[unused3]": 2, "<think>": 3},
        AddedToken("<|end|>", special=True),
        AddedToken("<|im_start|>"),
        AddedToken("<tool_call>"),
        AddedToken("[INST]"),
        AddedToken("</td>"),
        AddedToken("[1]"),
        AddedToken("Grüße"),
        AddedToken("  "),
    )
    vocabulary = read_vocabulary(tokenizer)
    special = {token.text for token in vocabulary.tokens if token.special}
    # <think> was never added: here it is a word like any other
    assert special == {"<|end|>", "<|im_start|>", "<tool_call>", "[INST]", "[unused3]"}
    assert all(vocabulary.by_text[text].data is None for text in special)
    # what is added is written as it is, and not in the alphabet of the rest
    assert vocabulary.by_text["Grüße"].data == "Grüße".encode()
    assert vocabulary.by_text["  "].data == b"  "
    assert spelled(tokenizer, "a  Grüße the</td>") == "a  Grüße the</td>".encode()


def test_gaps_and_tokens_without_bytes_are_told() -> None:
    tokenizer = from_words({"Ġthe": 0, "猫": 700, "": 701})
    vocabulary = read_vocabulary(tokenizer)
    assert vocabulary.size == 702
    assert len(vocabulary.tokens) < vocabulary.size
    assert set(vocabulary.left_out) == {700, 701}
    assert "no byte" in vocabulary.left_out[700]
    assert vocabulary.spell([0, 700]) is None


def test_a_normalizer_that_puts_text_in_lower_case_is_seen_anywhere() -> None:
    backend = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    backend.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    assert read_vocabulary(wrap(backend)).lower_cased


def test_what_cannot_be_read_is_refused() -> None:
    with pytest.raises(
        QuickmergeError, match=r"tokenizer must be one that the tokenizers library runs.*SimpleNamespace"
    ):
        read_vocabulary(SimpleNamespace(backend_tokenizer=None))  # type: ignore[arg-type]
    with pytest.raises(QuickmergeError, match="must have a vocabulary, got an empty"):
        read_vocabulary(wrap(Tokenizer(models.BPE())))
