from pathlib import Path

import pytest

from quickmerge.errors import DamagedWeightsError, UnknownModelError
from quickmerge.models import load
from quickmerge.models.folder import check_safetensors


def test_truncated_weights_are_named(tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in (0, 5, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:length])
        with pytest.raises(DamagedWeightsError) as caught:
            load(tiny_folder, progress=False)
        assert str(weights) in str(caught.value)
        assert "delete it" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("header", [b"not json", b"[1, 2]", b'{"a": {}}', b'{"a": 3}', b'{"a": {"data_offsets": []}}'])
def test_a_garbled_header_is_damage(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(DamagedWeightsError, match="garbled"):
        check_safetensors(path)


def test_trailing_bytes_are_damage(tiny_folder: Path) -> None:
    weights = tiny_folder / "model.safetensors"
    check_safetensors(weights)
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(DamagedWeightsError, match="bytes instead of"):
        check_safetensors(weights)


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UnknownModelError, match="but no weights"):
        load(tmp_path)


def test_a_garbled_config_is_named(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text("{ not json")
    with pytest.raises(DamagedWeightsError, match=r"config\.json is damaged"):
        load(tiny_folder, progress=False)


def test_a_part_that_the_index_lists_must_be_there(tiny_folder: Path) -> None:
    index = tiny_folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}')
    with pytest.raises(DamagedWeightsError, match=r"model-00002-of-00002\.safetensors is missing"):
        load(tiny_folder, progress=False)
    index.write_text("[]")
    with pytest.raises(DamagedWeightsError, match="not a weights index"):
        load(tiny_folder, progress=False)
