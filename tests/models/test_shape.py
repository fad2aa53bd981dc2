import json
from pathlib import Path
from typing import Any

import pytest

from quickmerge.data import SHAPES, shipped_shape
from quickmerge.errors import DamagedWeightsError, UnknownModelError, UnsupportedModelError
from quickmerge.models import load_shape_only, verify


def test_shapes_need_neither_a_cache_nor_weights(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUICKMERGE_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = load_shape_only("smollm2-135m")
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    (tiny_folder / "model.safetensors").unlink()
    assert load_shape_only(str(tiny_folder)).config.num_hidden_layers == 2


def test_a_shipped_shape_is_that_of_the_model(smollm2: tuple[Any, Any]) -> None:
    for name in SHAPES:
        folders = [shipped_shape(name), verify(name)]
        ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in folders if folder)
        for config in (ours, theirs):
            config.pop("transformers_version")
        assert ours == theirs
    assert shipped_shape("other") is None


def test_shapes_of_what_is_no_language_model(tmp_path: Path, tiny_folder: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"has no config\.json"):
        load_shape_only(str(tmp_path))
    path = tiny_folder / "config.json"
    config = json.loads(path.read_text())
    for change, error in (
        ({"model_type": "vit", "architectures": ["ViTModel"]}, UnsupportedModelError),
        ({"num_hidden_layers": 10**8}, UnsupportedModelError),
        ({"hidden_size": -1}, UnsupportedModelError),
    ):
        path.write_text(json.dumps({**config, **change}))
        with pytest.raises(error, match=r"config\.json|is not a causal"):
            load_shape_only(str(tiny_folder))
    path.write_text("{")
    with pytest.raises(DamagedWeightsError, match=r"config\.json is damaged"):
        load_shape_only(str(tiny_folder))
