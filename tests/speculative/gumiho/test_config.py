"""The shape of draft heads: defaults from a model, limits, the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from decoding_samples import FAMILIES, tiny

from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import Gumiho, GumihoConfig

FULL = {"features": 16, "embedding": 16, "vocabulary": 97, "attention_heads": 4, "key_value_heads": 2, "head_width": 4,
        "inner": 32, "mlp_width": 16}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_are_shaped_after_the_models_layers(family: str) -> None:
    config = GumihoConfig.of(tiny(family))
    text = tiny(family).config
    assert (config.features, config.vocabulary) == (text.hidden_size, text.vocab_size)
    assert config.attention_heads == text.num_attention_heads and config.inner == text.intermediate_size
    assert (config.serial, config.heads, config.depth, config.drafted) == (2, 5, 7, 97)
    assert Gumiho.new(tiny(family)).config.trained_for["hash"]


def test_parts_that_are_not_there_have_no_size() -> None:
    serial, parallel = GumihoConfig.of(tiny(), heads=0), GumihoConfig.of(tiny(), serial=0, serial_layers=0)
    assert (serial.mlp_width, parallel.attention_heads, parallel.inner) == (0, 0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"serial": 0, "heads": 0, "serial_layers": 0}, "serial and heads must draft a token at least, got 0 and 0"),
        ({"serial": 0}, "serial and serial_layers must both be 0 or both be more, got serial=0 and serial_layers=2"),
        ({"key_value_heads": 3}, r"key_value_heads must divide attention_heads \(4\), got 3"),
        ({"head_width": 5}, "head_width must be even, since rotary positions turn pairs, got 5"),
        ({"draft_vocabulary": 98}, "draft_vocabulary must be at most the 97 tokens of the model, got 98"),
        ({"mlp_depth": 1}, "mlp_depth must be a whole number of at least 2, got 1"),
        ({"activation": "selu"}, "activation must be one of silu, relu, got 'selu' .did you mean 'silu'"),
        ({"feature_scale": 0}, "feature_scale must be a number above 0, got 0"),
        ({"inner": 0}, "inner must be a whole number of at least 1, got 0"),
        ({"heads": -1}, "heads must be a whole number of at least 0, got -1"),
    ],
)
def test_limits(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GumihoConfig(**{**FULL, **wrong})


def test_an_unknown_field_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"unknown setting 'serial_layer' of the draft heads .did you mean 'serial_layers'"
    ):
        GumihoConfig.of(tiny(), serial_layer=1)


def test_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = GumihoConfig(**FULL, trained_for={"model": "tiny"})
    path.write_text(config.to_json())
    assert GumihoConfig.read(path) == config
    data = json.loads(path.read_text())
    for change, message in [
        ({"kind": "quickmerge-prior"}, 'must belong to draft heads ."kind": "quickmerge-gumiho".'),
        ({"haeds": 2}, "has the unknown entry 'haeds' .did you mean 'heads'"),
        ({"heads": "many"}, "heads must be a whole number"),
    ]:
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(QuickmergeError, match=message):
            GumihoConfig.read(path)
    path.write_text("{")
    with pytest.raises(QuickmergeError, match="must be JSON"):
        GumihoConfig.read(path)
    with pytest.raises(QuickmergeError, match=r"can't be read \(No such file"):
        GumihoConfig.read(tmp_path / "none.json")
