"""The first tokens of a text cost no more than those, and are the text's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transplant_samples import BASE

from quickmerge.bench.quality import EDGE, check_room, first_tokens
from quickmerge.errors import QuickmergeError


class Counting:
    """A tokenizer that notes how much it was given."""

    def __init__(self) -> None:
        self.longest = 0

    def __call__(self, text: str, **settings: object) -> dict[str, list[int]]:
        self.longest = max(self.longest, len(text))
        ids: dict[str, list[int]] = BASE(text, **settings)
        return ids


PARTS = st.sampled_from(["the ", "sea", "\n", "  ", "é", "日本", "🐟", "x" * 50, " " * 90])


@settings(deadline=None, max_examples=40)
@given(st.lists(PARTS, min_size=1, max_size=60), st.integers(1, 40))
def test_they_are_those_of_the_whole_text(parts: list[str], limit: int) -> None:
    text = "".join(parts) * 8
    whole = BASE(text, add_special_tokens=False)["input_ids"]
    if whole:
        assert first_tokens(BASE, text, limit) == whole[:limit]


def test_a_long_text_is_read_no_further_than_needed() -> None:
    counting = Counting()
    assert len(first_tokens(counting, "the sea was calm. " * 100_000, 50)) == 50
    assert counting.longest <= 64 * (50 + EDGE)


def test_long_tokens_are_followed_as_far_as_they_go() -> None:
    text = "the" + " " * 5000 + "sea"
    whole = BASE(text, add_special_tokens=False)["input_ids"]
    assert first_tokens(BASE, text, len(whole) + 5) == whole


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(QuickmergeError, match="got none"):
        first_tokens(lambda text, **_: {"input_ids": []}, "x", 3)


def test_a_text_that_no_model_has_room_for_is_refused_early() -> None:
    counting = Counting()
    model = SimpleNamespace(
        config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=100))
    )
    with pytest.raises(QuickmergeError, match="100 positions, got more than 90 and 10 tokens"):
        check_room(model, counting, "the text", "the sea " * 200_000, 10)
    assert counting.longest <= 64 * 110
    check_room(model, counting, "the text", "the sea", 10)
