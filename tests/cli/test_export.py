"""``quickmerge export``: heads of a tiny model as an EAGLE drafter and in Gumiho's layout, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quickmerge as qm


@pytest.fixture
def heads(tiny_folder: Path, tmp_path: Path) -> Path:
    model, _ = qm.load(str(tiny_folder))
    torch.manual_seed(0)
    made = qm.Gumiho.new(model, heads=2, mlp_depth=2, inner=16)
    made.save_pretrained(tmp_path / "heads")
    return tmp_path / "heads"


def test_eagle_and_there_and_back(run: Any, tiny_folder: Path, heads: Path, tmp_path: Path) -> None:
    code, told, err = run("export", "eagle", "--heads", heads, "--model", tiny_folder, "--out", tmp_path / "eagle")
    assert code == 0, err
    assert "an EAGLE drafter of 2 layer(s) in float32; its 2 parallel heads have no place in it" in told + err
    state = load_file(tmp_path / "eagle" / "model.safetensors")
    assert json.loads((tmp_path / "eagle" / "config.json").read_text())["num_hidden_layers"] == 2
    base = ["--model", tiny_folder, "--out"]
    assert run("export", "gumiho", "--heads", heads, *base, tmp_path / "public")[0] == 0
    # the public layout is taken as heads too, and gives the same drafter
    assert run("export", "--heads", tmp_path / "public", *base, tmp_path / "again")[0] == 0
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert state.keys() == again.keys()
    for name, value in state.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_wrong_is_one_sentence(run: Any, tiny_folder: Path, heads: Path, tmp_path: Path) -> None:
    out = ["--model", tiny_folder, "--out", tmp_path / "out"]
    for words, message in (
        (["--heads", heads, "--dtype", "float8"], "--dtype must be one of float32, float16, bfloat16, got 'float8'"),
        (["--heads", tmp_path / "none"], "draft heads must be a folder with config.json and model.safetensors"),
        (["--heads", "smollm2-135m"], "model must have 49152 tokens in its vocabulary"),
    ):
        code, _, err = run("export", "eagle", *words, *out)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list((tmp_path / "out").glob("*"))
