"""The ways in which vocabularies write bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from quickmerge.models.tokenizers import from_byte_level, from_sentencepiece, from_wordpiece, printable_bytes


def test_the_map_of_bytes_is_that_of_the_tokenizers_library() -> None:
    table = printable_bytes()
    assert sorted(table.values()) == list(range(256))
    assert set(table) == set(pre_tokenizers.ByteLevel.alphabet())
    assert (table["Ġ"], table["Ċ"], table["ĉ"], table["A"]) == (ord(" "), ord("\n"), ord("\t"), 0x41)


@given(st.text())
def test_byte_level_text_comes_back(text: str) -> None:
    written = "".join(
        piece for piece, _ in pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    )
    assert from_byte_level(written) == text.encode()


def test_what_is_no_byte_is_told() -> None:
    assert from_byte_level("猫") is None
    assert from_byte_level("a b") is None  # a space would be written Ġ
    assert from_byte_level("") == b""


def test_the_same_letter_means_other_bytes_elsewhere() -> None:
    assert from_byte_level("è") == b"\xe8"
    assert from_sentencepiece("è") == b"\xc3\xa8"


def test_sentencepiece() -> None:
    assert from_sentencepiece("▁▁▁the") == b"   the"
    assert from_sentencepiece("<0x0A>") == b"\n"
    assert from_sentencepiece("<0xe8>") == b"\xe8"
    assert from_sentencepiece("<0x0A>", byte_fallback=False) == b"<0x0A>"
    assert from_sentencepiece("<0x0A>a") == b"<0x0A>a"
    assert from_sentencepiece("_a", space="_") == b" a"


def test_wordpiece() -> None:
    assert from_wordpiece("##ing") == (b"ing", True)
    assert from_wordpiece("cat") == (b" cat", False)
    assert from_wordpiece(",", spaced=False) == (b",", False)
    assert from_wordpiece("##") == (b" ##", False)  # the mark with nothing behind it is text
