"""Which tokens of a text belong together, by tokenizers of several families."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from strategies import prop
from tokenizer_samples import byte_level, sentencepiece_bpe, unigram, wordpiece

from quickmerge.errors import QuickmergeError
from quickmerge.models.spans import (
    FEW,
    LONG,
    LONGEST,
    UNITS,
    Piece,
    check_tokenizer,
    cut,
    pieces_of,
    spans,
    tokenizer_of,
    within,
)

TOKENIZERS = {"byte level": byte_level, "sentencepiece": sentencepiece_bpe, "unigram": unigram, "wordpiece": wordpiece}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def parts(text: str, unit: str, tokenizer: Any) -> list[str]:
    """The spans of a text as they read."""
    ids = ids_of(tokenizer, text)
    found = cut(pieces_of(ids, tokenizer), unit)
    rows = [[i for i, g in zip(ids, found, strict=True) if g == k] for k in range(max(found) + 1)]
    return [tokenizer.decode(row, clean_up_tokenization_spaces=False).strip(" ") for row in rows]


def words(*texts: str) -> list[str]:
    """The same of tokens that are given as they write."""
    found = cut([Piece(text) for text in texts], "word")
    return ["".join(t for t, g in zip(texts, found, strict=True) if g == k) for k in range(max(found) + 1)]


def lines(*texts: str) -> list[str]:
    found = cut([Piece(text) for text in texts], "line")
    return ["".join(t for t, g in zip(texts, found, strict=True) if g == k) for k in range(max(found) + 1)]


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
def test_lines_and_sentences(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    text = 'The code is 7482. "Is it?" he said\nNo! See 3.14 here.\n\n1. One item\n'
    want = ["The code is 7482.", '"Is it?"', "he said\n", "No!", "See 3.14 here.\n\n", "1. One item\n"]
    assert parts(text, "line", tokenizer) == want


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
def test_words_hold_the_space_in_front_of_them(name: str) -> None:
    assert parts("The code is 12, 345 (and 6789)!", "word", TOKENIZERS[name]()) == [
        "The", "code", "is", "12,", "345", "(and", "6789)!",
    ]  # fmt: skip


def test_a_space_of_its_own_belongs_to_the_digits_behind_it() -> None:
    assert words("is", " ", "7", "4", "8", " ", "9", " now") == ["is", " 748", " 9", " now"]


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
def test_languages_without_spaces(name: str) -> None:
    """Sentences end without a space; characters of several tokens are not cut."""
    tokenizer = TOKENIZERS[name]()
    text = "猫は窓に座っています。我们使用它！好吗？"
    assert parts(text, "line", tokenizer) == ["猫は窓に座っています。", "我们使用它！", "好吗？"]
    short = parts(text, "word", tokenizer)
    assert len(short) > 4 and "".join(short) == text and "\ufffd" not in "".join(short)


def test_code_goes_by_lines() -> None:
    code = "def add(a, b):\n    return a + b  # the sum\n\n\nx = add(1, 2)\n"
    assert "".join(parts(code, "line", byte_level())).count("\n") == 5
    assert lines("x", " =", " 1", "\n", "\n", "    ", "y", "\n") == ["x = 1\n\n", "    y\n"]


def test_long_lines_are_cut_in_front_of_a_word_or_at_the_latest_anywhere() -> None:
    text = [" a", "b"] * 40
    sizes = [len(each) // 3 * 2 for each in lines(*text)]
    assert sizes[0] == LONG and sum(sizes) == 80
    assert [len(each) for each in lines(*["x"] * 100)] == [LONGEST, LONGEST, 20]
    assert [len(each) for each in words(*["x"] * 100)] == [LONGEST, LONGEST, 20]
    assert [len(each) for each in words(*["字"] * 10)] == [FEW, FEW, 2]


@pytest.mark.parametrize(
    ("texts", "want"),
    [
        (("Dr", ".", " J", ".", " Doe", "."), ["Dr.", " J. Doe."]),
        (("2", ".", " Two", ".", " Next"), ["2. Two.", " Next"]),
        (("So", ".", ")", " Then"), ["So.)", " Then"]),
        (("是", "。", "」", "他"), ["是。」", "他"]),
        (("a.", "b", " c"), ["a.b c"]),
        (("One. ", "Two"), ["One. ", "Two"]),
    ],
)
def test_where_a_sentence_ends(texts: tuple[str, ...], want: list[str]) -> None:
    assert lines(*texts) == want


def test_special_tokens_stand_alone() -> None:
    tokenizer = byte_level(special=("<|endoftext|>", "<|im_start|>"))
    ids = [*ids_of(tokenizer, "the cat"), 1, *ids_of(tokenizer, " the dog"), 0, 0]
    found = cut(pieces_of(ids, tokenizer), "line")
    assert found == [0] * found.count(0) + [1] + [2] * found.count(2) + [3, 4]
    # What the model has rows for and the tokenizer no text is no text either.
    assert pieces_of([10**6], tokenizer) == [Piece("", special=True)]


TEXTS = st.text(st.sampled_from("ab 1.?!\n字。は 🙂é\"'"), min_size=1, max_size=60)


@prop(60)
@given(TEXTS, st.sampled_from(UNITS), st.sampled_from(sorted(TOKENIZERS)))
def test_spans_rise_by_one_and_hold_whole_characters(text: str, unit: str, name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = ids_of(tokenizer, text)
    if not ids:
        return
    found = cut(pieces_of(ids, tokenizer), unit)
    assert found[0] == 0 and all(b - a in (0, 1) for a, b in pairwise(found))
    if name != "byte level":
        return
    for k in range(max(found) + 1):
        assert "\ufffd" not in tokenizer.decode([i for i, g in zip(ids, found, strict=True) if g == k])


@prop(40)
@given(st.lists(TEXTS, min_size=1, max_size=3), st.integers(0, 4), st.booleans(), st.sampled_from(UNITS))
def test_a_batch_is_its_rows_whatever_pads_it(texts: list[str], more: int, left: bool, unit: str) -> None:
    tokenizer = byte_level()
    rows = [ids_of(tokenizer, text) for text in texts]
    width = max(map(len, rows)) + more
    ids, valid = torch.randint(1, 300, (len(rows), width)), torch.zeros(len(rows), width, dtype=torch.bool)
    for row, given_ids in enumerate(rows):
        place = slice(width - len(given_ids), width) if left else slice(0, len(given_ids))
        ids[row, place], valid[row, place] = torch.tensor(given_ids), True
    found = spans(ids, valid, tokenizer, unit)
    assert (found[~valid] == -1).all()
    for row, given_ids in enumerate(rows):
        assert found[row, valid[row]].tolist() == cut(pieces_of(given_ids, tokenizer), unit)


@prop(40)
@given(st.integers(1, 20), st.integers(0, 10**6))
def test_no_span_reaches_over_a_border(tokens: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    group = (torch.rand(2, tokens, generator=rng) < 0.3).long().cumsum(-1)
    border = torch.rand(2, tokens, generator=rng) < 0.4
    found = within(group, border)
    for row in range(2):
        for i in range(1, tokens):
            same = bool(group[row, i] == group[row, i - 1]) and bool(border[row, i] == border[row, i - 1])
            assert int(found[row, i] - found[row, i - 1]) == (0 if same else 1)
    assert (found[:, 0] == 0).all()


def test_another_unit_and_what_is_no_tokenizer_are_refused() -> None:
    with pytest.raises(QuickmergeError, match=r"spans must be one of line, word, got 'lin' .did you mean 'line'"):
        cut([], "lin")
    with pytest.raises(ValueError, match=r"tokenizer must be a tokenizer of transformers, or None .*, got 'gpt2'"):
        check_tokenizer("gpt2")

    class Processor:
        tokenizer = byte_level()

    assert check_tokenizer(None) is None and check_tokenizer(Processor()) is byte_level()


def test_a_model_in_a_folder_brings_its_tokenizer(tmp_path: Any) -> None:
    config = transformers.LlamaConfig(
        vocab_size=420, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    bare = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert tokenizer_of(bare) is None and tokenizer_of(transformers.LlamaForCausalLM(config)) is None
    byte_level().save_pretrained(tmp_path)
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    found = tokenizer_of(model)
    assert found.get_vocab() == byte_level().get_vocab() and tokenizer_of(model) is found
    assert tokenizer_of(bare) is None  # looked up once
