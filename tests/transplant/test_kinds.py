"""What sort of text a token is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.transplant.matching import KINDS, kind_of


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word start"),
        (" naïve", "word start"),
        (" don't", "word start"),
        ("ing", "continuation"),
        ("The", "continuation"),
        ("e\u0301", "continuation"),  # a letter and its accent apart
        ("12", "digits"),
        (" 7", "digits"),
        (" кот", "non-Latin"),
        ("猫", "non-Latin"),
        ("aя", "non-Latin"),
        ("  the", "code/punctuation/space"),
        (" ", "code/punctuation/space"),
        ("\n\n", "code/punctuation/space"),
        ("'s)", "code/punctuation/space"),
        ("1.", "code/punctuation/space"),
        ("'", "code/punctuation/space"),
        ("x1", "code/punctuation/space"),
        ("🦊", "code/punctuation/space"),
    ],
)
def test_examples(text: str, kind: str) -> None:
    assert kind_of(text.encode()) == kind


def test_a_part_of_a_character_belongs_to_another_script() -> None:
    assert kind_of(b"\xe7\x8c") == "non-Latin"


@given(st.binary(max_size=8))
def test_every_token_has_a_kind(data: bytes) -> None:
    assert kind_of(data) in KINDS
