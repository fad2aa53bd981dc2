"""The donor with vectors: two files of one wheel, each checked, none imported."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from quickmerge.errors import DamagedWeightsError, FetchError
from quickmerge.models import download as wheel
from quickmerge.models import wordllama


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package that holds the two files, and whose import would fail."""
    folder = tmp_path / "a_package_with_vectors"
    for one in wordllama.FILES:
        (folder / one.member).parent.mkdir(parents=True)
        (folder / one.member).write_text(f"content of {one.member}")
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    files = [replace(one, module=folder.name, sha256=wheel.sha256_of(folder / one.member)) for one in wordllama.FILES]
    monkeypatch.setattr(wordllama, "FILES", tuple(files))
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_the_files_get_the_names_that_the_folder_promises(package: Path, tmp_path: Path) -> None:
    folder = wordllama.prepare(tmp_path / "cache", progress=False)
    assert folder == wordllama.folder_in(tmp_path / "cache")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert sorted(manifest["files"]) == sorted([wordllama.TOKENIZER, wordllama.VECTORS])
    for name, member in zip((wordllama.TOKENIZER, wordllama.VECTORS), wordllama.MEMBERS, strict=True):
        assert (folder / name).read_text() == f"content of {member}"
        (package / member).unlink()
    assert wordllama.prepare(tmp_path / "cache", progress=False) == folder  # nothing is read again
    (folder / wordllama.VECTORS).write_text("x")
    with pytest.raises(DamagedWeightsError, match=r"l2_supercat_256\.safetensors is damaged"):
        wordllama.prepare(tmp_path / "cache", progress=False)


def test_another_release_is_not_taken(package: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (package / next(iter(wordllama.MEMBERS))).write_text("another release")
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(FetchError, match=r"wordllama==0\.2\.0, which holds wordllama-l2"):
        wordllama.prepare(tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
