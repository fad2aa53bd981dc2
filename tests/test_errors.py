from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import quickmerge as qm
from quickmerge import errors
from quickmerge.errors import QuickmergeError, as_index, near_match, whole_number
from quickmerge.merge.tokens import Removal, Schedule


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


WHOLE = [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor([5], dtype=torch.int32)]
NOT_WHOLE = [
    True,
    np.True_,
    torch.tensor(True),
    5.0,
    np.float64(5),
    torch.tensor(5.0),
    "5",
    None,
    [5],
    np.array([5, 6]),
]


@pytest.mark.parametrize("given", WHOLE, ids=repr)
def test_whole_numbers_of_any_kind_become_pythons_own(given: object) -> None:
    assert type(as_index(given)) is int and as_index(given) == 5
    assert type(whole_number("count", given)) is int and whole_number("count", given, 5) == 5
    with pytest.raises(ValueError, match=r"^count must be a whole number of at least 6, got "):
        whole_number("count", given, 6)


@pytest.mark.parametrize("given", NOT_WHOLE, ids=repr)
def test_nothing_else_is_a_whole_number(given: object) -> None:
    assert as_index(given) is None
    with pytest.raises(ValueError, match=r"^count must be a whole number of at least 1, got "):
        whole_number("count", given)


@pytest.mark.parametrize("kind", [np.int64, np.int32, torch.tensor])
def test_settings_take_whole_numbers_of_any_kind(kind: type) -> None:
    """And hold Python's own, so that they compare, print and go into JSON as these do."""
    one = kind(1)
    assert qm.Count(one) == qm.Count(1) and type(qm.Count(one).tokens) is int
    assert Removal(kind(3)) == Removal(3) and Removal([one, kind(2)]) == Removal((1, 2))
    assert Schedule((one, kind(4))) == Schedule((1, 4)) == Schedule.of([one, kind(4)], 6)
    assert qm.QuickMerge(window=kind(8), pool=kind(3)).label == "quickmerge:window=8:pool=3"
    assert repr(qm.Truncate(sinks=kind(2))) == repr(qm.Truncate(sinks=2))


def test_no_number_is_checked_and_then_used_as_it_was_given() -> None:
    """Every call of `whole_number` uses what it returns: the number as Python's own."""
    source = Path(errors.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            bare = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
            called = getattr(node.value.func, "id", "") if bare else ""
            assert called != "whole_number", f"{path.relative_to(source)}:{node.lineno}"
