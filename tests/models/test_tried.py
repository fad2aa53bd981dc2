"""A tokenizer that can be read but not used is told at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quickmerge.errors import UnsupportedModelError
from quickmerge.models import load


@pytest.mark.parametrize("longest", [{"a": 1}, "many", True, []])
def test_a_tokenizer_must_be_of_use(tiny_folder: Path, longest: object) -> None:
    path = tiny_folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": longest}))
    with pytest.raises(UnsupportedModelError, match="no usable tokenizer"):
        load(tiny_folder, progress=False)


def test_a_sound_one_is_given_back(tiny_folder: Path) -> None:
    assert load(tiny_folder, progress=False)[1]("the sea")["input_ids"] == [2, 3]
