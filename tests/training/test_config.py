import json
from pathlib import Path
from typing import Any

import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.training import TrainingConfig


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("steps", 0),
        ("batch", 1.5),
        ("accumulate", True),
        ("learning_rate", 0),
        ("learning_rate", "fast"),
        ("learning_rate", float("nan")),
        ("warmup", -1),
        ("warmup", 101),
        ("schedule", "step"),
        ("final", 1.1),
        ("weight_decay", -0.1),
        ("betas", 0.9),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9, 0.99, 0.999)),
        ("clip", 0),
        ("clip", float("inf")),
        ("precision", "float16"),
        ("seed", -1),
        ("save_every", 0),
        ("log_every", None),
        ("max_minutes", 0),
    ],
)
def test_what_is_not_allowed_is_named(name: str, given: Any) -> None:
    with pytest.raises(ValueError) as caught:
        TrainingConfig(**{"steps": 100, name: given})
    assert name in str(caught.value)
    assert repr(given[1] if given == (0.9, 1.0) else given) in str(caught.value)


TEXTS = {
    ".toml": "steps = 7\nbetas = [0.8, 0.9]\n", ".json": '{"steps": 7, "betas": [0.8, 0.9]}',
    ".yaml": "steps: 7\nbetas: [0.8, 0.9]\n",
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".toml", ".json", ".yaml"])
def test_a_file_gives_the_same_settings(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"settings{suffix}"
    path.write_text(TEXTS[suffix])
    assert TrainingConfig.from_file(path) == TrainingConfig(steps=7, betas=(0.8, 0.9))


def test_a_dict_goes_through_json_and_back() -> None:
    config = TrainingConfig(steps=7, clip=None, max_minutes=1.5)
    again = json.loads(json.dumps(config.to_dict()))
    assert again == config.to_dict()
    assert TrainingConfig(**again) == config


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.toml", "steps = 7\nlearning_rat = 1", "did you mean 'learning_rate'?"),
        ("a.toml", "steps = 7\nzzz = 1", "known are steps, batch"),
        ("a.toml", "batch = 7", "how many steps"),
        ("a.toml", "steps = ", "can't be understood"),
        ("a.json", "[1]", "got a list"),
        ("a.json", '{"steps": 0}', "steps must be a whole number of at least 1, got 0"),
        ("a.yaml", "steps: seven", "steps must be a whole number of at least 1, got 'seven'"),
        ("a.ini", "steps: 7", "must be a .yaml, .toml or .json file"),
    ],
)
def test_a_bad_file_is_told_in_one_sentence(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(QuickmergeError) as caught:
        TrainingConfig.from_file(tmp_path / name)
    assert told in str(caught.value) and name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match=r"none\.toml can't be read: No such file"):
        TrainingConfig.from_file(tmp_path / "none.toml")
