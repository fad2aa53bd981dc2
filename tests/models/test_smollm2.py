import json
import os
from pathlib import Path
from typing import Any

import pytest

from quickmerge.errors import DamagedWeightsError, UnknownModelError
from quickmerge.models import smollm2 as embedded
from quickmerge.models import verify


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """A folder with a manifest as the conversion writes it, around one small file."""
    folder = embedded.folder_in(tmp_path)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"0123456789")
    embedded._write_manifest(folder)
    return folder


def test_an_untouched_folder_passes(written: Path, tmp_path: Path) -> None:
    embedded.check_folder(written)
    assert embedded.prepare(tmp_path, progress=False) == written
    assert verify(cache_dir=tmp_path) == written


def test_a_copy_with_new_time_stamps_passes(written: Path) -> None:
    os.utime(written / "model.safetensors", (1, 1))
    embedded.check_folder(written)


@pytest.mark.parametrize("damage", [b"01234", b"012345678X", None])
def test_damage_names_the_file_and_the_remedy(written: Path, tmp_path: Path, damage: bytes | None) -> None:
    weights = written / "model.safetensors"
    weights.unlink() if damage is None else weights.write_bytes(damage)
    with pytest.raises(DamagedWeightsError) as caught:
        embedded.prepare(tmp_path, progress=False)
    assert str(weights) in str(caught.value)
    assert f"delete the folder {written} and run again" in str(caught.value)


def test_only_the_full_check_sees_what_kept_size_and_time(written: Path, tmp_path: Path) -> None:
    weights = written / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"012345678X")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    embedded.check_folder(written)
    with pytest.raises(DamagedWeightsError, match="sha256"):
        verify(cache_dir=tmp_path)


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"files": 3}', '{"files": {"model.safetensors": {}}}'])
def test_a_manifest_that_says_nothing_is_damage(written: Path, text: str | None) -> None:
    manifest = written / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(DamagedWeightsError, match=r"manifest\.json is missing or unreadable"):
        embedded.check_folder(written)


def test_verify_knows_only_embedded_models() -> None:
    with pytest.raises(UnknownModelError, match=r"did you mean 'smollm2-135m'\?\), but must be one of: smollm2-135m"):
        verify("smollm-135m")


def test_the_manifest_of_the_real_model(smollm2: tuple[Any, Any]) -> None:
    folder = verify()
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["description"] == "SmolLM2-135M-Instruct, weights from the Q4_1 GGUF, run in fp32"
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= set(
        manifest["files"]
    )


@pytest.mark.slow
def test_an_empty_cache_is_filled_and_the_same_every_time(smollm2: tuple[Any, Any], tmp_path: Path) -> None:
    folder = embedded.prepare(tmp_path, progress=False)
    first, again = (json.loads((path / "manifest.json").read_text()) for path in (verify(), folder))
    assert {name: entry["sha256"] for name, entry in again["files"].items()} == {
        name: entry["sha256"] for name, entry in first["files"].items()
    }
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
