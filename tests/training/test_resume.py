from pathlib import Path
from typing import Any

import pytest
from training_samples import settings

from quickmerge.errors import QuickmergeError
from quickmerge.training.loop import check_same, run_identity


def identity(fingerprint: dict[str, Any] | None = None, items: int = 5, processes: int = 1, **changes: Any) -> Any:
    return run_identity(settings(**changes), fingerprint, items, processes)


@pytest.mark.parametrize(
    ("then", "now", "told"),
    [
        ({}, {"learning_rate": 0.5}, "config learning_rate was 0.01 when .* is 0.5 now"),
        ({}, {"betas": (0.5, 0.6)}, r"config betas was \[0.9, 0.999\] .* is \[0.5, 0.6\] now"),
        ({}, {"steps": 13}, "config steps was 12 when .* is 13 now"),
        ({"schedule": "constant"}, {"schedule": "constant", "steps": 11}, "config steps was 12 when .* is 11 now"),
        ({"fingerprint": {"model": "a"}}, {"fingerprint": {"model": "b"}}, "fingerprint model was 'a' .* is 'b' now"),
        ({"fingerprint": {"model": "a"}}, {}, "fingerprint model was 'a' .* is None now"),
        ({}, {"items": 6}, "the dataset's length was 5 .* is 6 now"),
        ({}, {"processes": 2}, "the number of processes was 1 .* is 2 now"),
    ],
)
def test_a_difference_is_named_with_both_values(then: Any, now: Any, told: str) -> None:
    with pytest.raises(QuickmergeError, match=told):
        check_same(Path("out"), identity(**then), identity(**now))


@pytest.mark.parametrize(
    ("then", "now"),
    [
        ({}, {}),
        ({}, {"max_minutes": 3, "save_every": 1, "log_every": 1}),
        ({"schedule": "constant"}, {"schedule": "constant", "steps": 13}),
        ({"fingerprint": {"files": ("a", "b")}}, {"fingerprint": {"files": ["a", "b"]}}),
    ],
)
def test_what_changes_nothing_is_let_through(then: Any, now: Any) -> None:
    check_same(Path("out"), identity(**then), identity(**now))


def test_a_fingerprint_must_fit_json() -> None:
    with pytest.raises(QuickmergeError, match="fingerprint must hold only what JSON can"):
        identity({"path": Path("a")})
