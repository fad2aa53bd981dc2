import pytest

from quickmerge import errors
from quickmerge.errors import QuickmergeError, near_match


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name.endswith("Error")])
def test_every_error_is_a_quickmerge_error_and_a_value_error(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, QuickmergeError)
    assert issubclass(kind, ValueError)
    assert str(kind("one sentence")) == "one sentence"


@pytest.mark.parametrize("given", ["quickmrge", "QuickMerge", "quick-merge"])
def test_a_slip_finds_the_word_that_was_meant(given: str) -> None:
    assert near_match(given, ["tome", "quickmerge", "random"]) == " (did you mean 'quickmerge'?)"


def test_nothing_close_says_nothing() -> None:
    assert near_match("zebra", ["tome", "quickmerge"]) == ""
    assert near_match("zebra", []) == ""
    assert near_match("", ["tome"]) == ""


def test_the_allowed_word_is_shown_as_it_is_written() -> None:
    assert near_match("quickmerge", ["QuickMerge"]) == " (did you mean 'QuickMerge'?)"
