"""Tokens are matched by their bytes."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import byte_level, from_words, sentencepiece_bpe, unigram, wordpiece
from tokenizers import AddedToken, Tokenizer
from transformers import LlamaTokenizerFast, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from quickmerge.models.tokenizers import load_tokenizer
from quickmerge.transplant.matching import KINDS, Matching, match
from quickmerge.transplant.tokens import Token, Vocabulary, read_vocabulary

FAMILIES = {
    "byte-level": byte_level,
    "prepend": sentencepiece_bpe,
    "metaspace": lambda: sentencepiece_bpe(460, "metaspace"),
    "unigram": unigram,
    "wordpiece": wordpiece,
}


def parts(matching: Matching) -> list[int]:
    return sorted([*matching.shared[:, 0].tolist(), *matching.special, *matching.unmapped, *matching.new.tolist()])


@pytest.mark.parametrize("donor", FAMILIES)
@pytest.mark.parametrize("base", FAMILIES)
def test_laws_of_a_matching(donor: str, base: str) -> None:
    mine, theirs = read_vocabulary(FAMILIES[donor]()), read_vocabulary(FAMILIES[base]())
    matching = match(mine, theirs)
    assert parts(matching) == [token.id for token in mine.tokens]
    assert (np.diff(matching.shared[:, 0]) > 0).all()
    # the slow, obvious statement: equal bytes, and nothing else
    spellings = defaultdict(set)
    for token in theirs.tokens:
        spellings[token.data].add(token.id)
    for one, other in matching.shared.tolist():
        assert other in spellings[mine.by_id[one].data]
    assert not any(mine.by_id[one].data in spellings for one in matching.new.tolist())
    assert len(matching.shared) > 5
    assert set(matching.kinds) == {*matching.shared[:, 0].tolist(), *matching.new.tolist()}
    assert set(matching.kinds.values()) <= set(KINDS)
    assert set(matching.aliases) <= set(matching.kinds)
    again = match(mine, theirs)
    assert (again.shared == matching.shared).all() and again.special == matching.special


@pytest.mark.parametrize("family", FAMILIES)
def test_a_vocabulary_matches_itself_one_to_one(family: str) -> None:
    vocabulary = read_vocabulary(FAMILIES[family]())
    matching = match(vocabulary, vocabulary)
    assert (matching.shared[:, 0] == matching.shared[:, 1]).all()
    assert matching.special == {token.id: (token.id,) for token in vocabulary.tokens if token.special}
    assert (matching.unmapped, matching.new.tolist()) == ((), [])


def test_letters_and_bytes_are_told_apart_across_alphabets() -> None:
    donor, base = read_vocabulary(sentencepiece_bpe()), read_vocabulary(byte_level())
    pairs = dict(match(donor, base).shared.tolist())
    spelled = {base.by_id[other].text for one, other in pairs.items() if donor.by_id[one].text == "<0x0A>"}
    assert spelled == {"Ċ"}
    assert base.by_id[pairs[donor.by_text["▁the"].id]].text == "Ġthe"
    assert base.by_id[pairs[donor.by_text["<0xE8>"].id]].text == "è"  # this very byte
    # ... which is not the letter that looks the same
    letter = donor.by_text["ö"]
    assert letter.id not in pairs or base.by_id[pairs[letter.id]].data == "ö".encode()


def test_aliases_go_to_aliases_and_bytes_in_use_to_tokens_in_use() -> None:
    def sentencepiece(*texts: str) -> Vocabulary:
        tokens = []
        for one, text in enumerate(texts):
            byte = text.startswith("<0x")
            tokens.append(Token(one, text, bytes([int(text[3:5], 16)]) if byte else text.encode(), byte=byte))
        return Vocabulary(tuple(tokens), "sentencepiece", len(tokens), False, {})

    both, text, byte = sentencepiece("<0x41>", "B", "A"), sentencepiece("x", "A"), sentencepiece("<0x41>")
    assert match(both, text).shared.tolist() == [[0, 1], [2, 1]]  # one row serves both
    assert match(both, text).aliases == (0,)
    assert match(both, both).shared.tolist() == [[0, 0], [1, 1], [2, 2]]
    assert match(byte, both).shared.tolist() == [[0, 2]]  # the donor does use this byte
    assert match(byte, both).aliases == ()


def test_a_plain_comma_of_wordpiece_is_one_without_a_space() -> None:
    donor = read_vocabulary(wordpiece())
    base = read_vocabulary(byte_level())
    pairs = dict(match(donor, base).shared.tolist())
    assert base.by_id[pairs[donor.by_text[","].id]].text == ","
    assert base.by_id[pairs[donor.by_text["the"].id]].text == "Ġthe"
    assert base.by_id[pairs[donor.by_text["##a"].id]].text == "a"


@pytest.mark.parametrize("way", ["prepend", "metaspace"])
def test_the_class_that_opens_a_tokenizer_changes_nothing(way: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(way)
    sentencepiece_bpe(way=way).backend_tokenizer.save(str(folder / "tokenizer.json"))
    opened: list[PreTrainedTokenizerBase] = [
        PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")),
        LlamaTokenizerFast.from_pretrained(folder),
        load_tokenizer(folder / "tokenizer.json"),
    ]
    base = read_vocabulary(byte_level())
    donors = [read_vocabulary(one) for one in opened]
    matchings = [match(donor, base) for donor in donors]
    assert donors[0] == donors[1] == donors[2]
    for other in matchings[1:]:
        assert (other.shared == matchings[0].shared).all()
        assert (other.special, other.unmapped, other.kinds) == (
            matchings[0].special,
            matchings[0].unmapped,
            matchings[0].kinds,
        )


def test_a_plain_token_that_the_user_maps_is_not_shared() -> None:
    donor = from_words({"Ġthe": 0, "Ġcat": 1})
    base = from_words({"Ġcat": 0, "Ġthe": 1})
    matching = match(read_vocabulary(donor), read_vocabulary(base), {"Ġthe": " cat"}, base_tokenizer=base)
    assert matching.special == {0: (0,)}
    assert 0 not in matching.shared[:, 0] and 0 not in matching.kinds
    assert parts(matching) == [token.id for token in read_vocabulary(donor).tokens]


def test_tokens_without_bytes_are_rebuilt_like_new_ones() -> None:
    donor = read_vocabulary(from_words({"Ġthe": 0, "": 300}))
    matching = match(donor, read_vocabulary(byte_level()))
    assert 300 in matching.new
    assert matching.kinds[300] == "code/punctuation/space"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.sampled_from("abc ▁é"), min_size=1, max_size=3), max_size=12, unique=True), st.randoms())
def test_the_order_of_ids_changes_no_pair(words: list[str], draw: object) -> None:
    def vocabulary(order: list[str]) -> Vocabulary:
        tokens = tuple(Token(one, word, word.encode()) for one, word in enumerate(order))
        return Vocabulary(tokens, "sentencepiece", len(order), False, {})

    base = vocabulary(["a", "b", " a", "é", "ab"])
    shuffled = list(words)
    draw.shuffle(shuffled)  # type: ignore[attr-defined]
    found = {words[one]: other for one, other in match(vocabulary(words), base).shared.tolist()}
    assert found == {shuffled[one]: other for one, other in match(vocabulary(shuffled), base).shared.tolist()}
    assert set(found) == set(words) & {"a", "b", " a", "é", "ab"}


def test_an_added_token_comes_before_one_that_only_the_model_could_give() -> None:
    tokenizer = from_words({"ĠĠ": 0}, AddedToken("  "))
    vocabulary = read_vocabulary(tokenizer)
    added = vocabulary.by_text["  "].id
    assert tokenizer.encode("  ") == [added]
    assert match(vocabulary, read_vocabulary(byte_level())).aliases == (0,)
    assert Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()).encode("  ").ids == [added]
