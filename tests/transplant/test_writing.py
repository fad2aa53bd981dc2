"""The alphabet of a tokenizer is found from what its backend does."""

from __future__ import annotations

import pytest
from tokenizer_samples import byte_level, sentencepiece_bpe, unigram, wordpiece, wrap
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.tokens import find_writing


def test_every_family_is_told() -> None:
    assert find_writing(byte_level().backend_tokenizer).alphabet == "byte-level"
    for way in ("prepend", "metaspace"):
        writing = find_writing(sentencepiece_bpe(way=way).backend_tokenizer)
        assert (writing.alphabet, writing.byte_fallback, writing.space) == ("sentencepiece", True, "▁")
    writing = find_writing(unigram().backend_tokenizer)
    assert (writing.alphabet, writing.byte_fallback) == ("sentencepiece", False)
    writing = find_writing(wordpiece().backend_tokenizer)
    assert writing.alphabet == "wordpiece"
    assert {",", ".", "猫"} <= writing.isolated
    assert not {"cat", "the", "##s"} & writing.isolated


def test_a_backend_that_pads_by_itself_is_read_too() -> None:
    backend = Tokenizer.from_str(wordpiece().backend_tokenizer.to_str())
    backend.enable_padding(length=64, pad_token="[PAD]", pad_id=0)
    assert find_writing(backend).alphabet == "wordpiece"
    backend.enable_truncation(2)
    assert find_writing(backend).alphabet == "wordpiece"


def test_words_without_a_trace_of_spaces_are_refused() -> None:
    backend = Tokenizer(models.WordLevel({"the": 0, "cat": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(QuickmergeError, match=r"must be byte-level, SentencePiece or WordPiece.*got model WordLevel"):
        find_writing(backend)


def test_parts_that_promise_what_the_tokens_do_not_keep_are_refused() -> None:
    # the end of a word is marked too, as CLIP does: no byte stands for that mark
    letters = {character: place for place, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    ends = {f"{character}</w>": len(letters) + place for place, character in enumerate(letters)}
    backend = Tokenizer(models.BPE({**letters, **ends}, [], end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(QuickmergeError, match=r"can't be read as byte-level.*'Hello world' is cut into.*would spell"):
        find_writing(backend)


def test_a_vocabulary_that_knows_no_letter_is_refused() -> None:
    backend = Tokenizer(models.BPE({"?": 0, "\u2581": 1}, [], unk_token="?"))
    backend.decoder = decoders.Metaspace()
    with pytest.raises(QuickmergeError, match="knows the letters of none"):
        find_writing(wrap(backend).backend_tokenizer)
