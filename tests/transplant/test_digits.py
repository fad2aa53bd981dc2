"""How numbers are cut."""

from __future__ import annotations

import pytest
from tokenizer_samples import from_words, sentencepiece_bpe, wordpiece, wrap
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.matching import cut_number, digit_report, grouping
from quickmerge.transplant.tokens import read_vocabulary

SINGLE = from_words({"Ġthe": 0})


def in_groups(pattern: str) -> object:
    """A byte-level tokenizer that has every number of up to three digits as one token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    texts = [*letters, *(f"{number:0{width}}" for width in (2, 3) for number in range(10**width))]
    backend = Tokenizer(models.BPE({text: place for place, text in enumerate(texts)}, [], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return wrap(backend)


LEFT, RIGHT = in_groups(r"\p{N}{1,3}"), in_groups(r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))")


def test_each_way_of_grouping_is_named() -> None:
    numbers = [0, 7, 12, 345, 6789, 12345, 100200300]
    for tokenizer, words, cut in (
        (SINGLE, "one digit a token", ("1", "2", "3", "4", "5")),
        (LEFT, "groups of 3 from the left", ("123", "45")),
        (RIGHT, "groups of 3 from the right", ("12", "345")),
    ):
        vocabulary = read_vocabulary(tokenizer)  # type: ignore[arg-type]
        assert cut_number(tokenizer, vocabulary, 12345) == cut  # type: ignore[arg-type]
        assert grouping([cut_number(tokenizer, vocabulary, one) for one in numbers]) == words  # type: ignore[arg-type]
    assert grouping([("12",), ("345",)]) == "whole numbers"
    assert grouping([("1", "23"), ("12", "3")]) == "learned pieces of up to 2 digits"
    assert grouping([("1", "?")]) == "some digits are unknown to it"


def test_groups_from_either_side_differ_from_four_digits_on() -> None:
    report = digit_report(LEFT, RIGHT)  # type: ignore[arg-type]
    numbers = [number for number in range(10_000) if number >= 1000]
    # of the random longer ones, those whose digits fill whole groups are cut alike
    assert report.numbers == 11_000
    assert len(numbers) < report.different < len(numbers) + 1000
    assert report.share == report.different / report.numbers
    assert report.examples[0] == (1000, ("100", "0"), ("1", "000"))
    assert [len(str(number)) for number, _, _ in report.examples] == sorted(
        {len(str(one[0])) for one in report.examples}
    )
    assert "numbers are cut differently (base: groups of 3 from the left; donor: groups of 3 from the right" in str(
        report
    )
    again = digit_report(LEFT, RIGHT)  # type: ignore[arg-type]
    assert again == report
    assert digit_report(LEFT, RIGHT, seed=1).different != report.different  # type: ignore[arg-type]


def test_the_piece_of_a_space_does_not_count() -> None:
    # SentencePiece writes a mark of a space before a number that the others don't
    llama = sentencepiece_bpe()
    vocabulary = read_vocabulary(llama)
    assert cut_number(llama, vocabulary, 80) == ("8", "0")
    report = digit_report(llama, SINGLE, numbers=[0, 80, 91])
    assert (report.different, report.share, report.examples) == (0, 0.0, ())
    assert "cut alike" in str(report)


def test_every_number_is_spelled_by_its_pieces() -> None:
    for tokenizer in (SINGLE, LEFT, sentencepiece_bpe(), wordpiece()):
        vocabulary = read_vocabulary(tokenizer)  # type: ignore[arg-type]
        for number in (0, 5, 42, 2024, 6789, 10**14 + 7):
            cut = cut_number(tokenizer, vocabulary, number)  # type: ignore[arg-type]
            assert "?" in cut or "".join(cut) == str(number)


def test_bad_numbers_are_refused() -> None:
    with pytest.raises(QuickmergeError, match="numbers must hold at least one number"):
        digit_report(SINGLE, SINGLE, numbers=[])
    for bad in (-1, 1.5, True):
        with pytest.raises(QuickmergeError, match="each of numbers must be a whole number of at least 0"):
            digit_report(SINGLE, SINGLE, numbers=[bad])  # type: ignore[list-item]
