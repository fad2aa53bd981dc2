"""``quickmerge train gumiho`` on a tiny model: answers, training, resuming, drafting with it, and what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import quickmerge as qm

SMALL = ["--length", 24, "--batch", 3, "--save-every", 2, "--mlp-depth", 2, "--inner", 16, "--heads", 2]
ASKED = ["--generate", 6, "--passage", 8, "--answer-tokens", 10, "--at-once", 4]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in "ab":
        (folder / f"{name}.txt").write_text("the sea the the sea " * 30 + name)
    return folder


def test_answers_heads_and_drafts(run: Any, tiny_folder: Path, texts: Path, tmp_path: Path) -> None:
    out, kept = tmp_path / "heads", tmp_path / "kept"
    base = ["train", "gumiho", "--model", tiny_folder, *SMALL]
    code, told, err = run(
        *base, "--data", texts, *ASKED, "--windows", 5, "--draft-vocab", 30, "--steps", 3, "--half", "--out", out
    )
    assert code == 0 and f"wrote {out}" in told, err
    assert "6 answers of" in err and "and 5 windows of 24 tokens" in err and "30 tokens can be drafted: 9" in err
    assert len((out / "answers.jsonl").read_text().splitlines()) == 9
    config = json.loads((out / "config.json").read_text())
    assert config["kind"] == "quickmerge-gumiho" and config["draft_vocabulary"] <= 30 and config["heads"] == 2
    assert load_file(out / "model.safetensors")["fusion.weight"].dtype == torch.float16
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]
    model, _ = qm.load(str(tiny_folder))
    engine = qm.SpeculativeDecoding(qm.Gumiho.from_pretrained(out), tree=6)
    ids = torch.tensor([[2, 3, 2], [3, 3, 2]])
    text = model.generate(ids, max_new_tokens=12, do_sample=False, custom_generate=engine, pad_token_id=1)
    assert torch.equal(text, model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1))
    # Other heads on the same answers, read once for both of them.
    for name, shape in (("serial", ["--serial", 3, "--heads", 0]), ("parallel", ["--serial", 0, "--serial-layers", 0])):
        more = ["--answers", out / "answers.jsonl", "--features", kept, "--steps", 2, "--out", tmp_path / name]
        code, told, err = run(*base, *more, *shape)
        assert code == 0 and "read once" in err, err
    assert sorted(path.name for path in kept.iterdir()) == ["features.bf16", "features.json"]
    assert qm.Gumiho.from_pretrained(tmp_path / "serial").config.depth == 3


def test_a_stopped_run_goes_on_to_the_same_weights(run: Any, tiny_folder: Path, texts: Path, tmp_path: Path) -> None:
    base = ["train", "gumiho", "--model", tiny_folder, "--data", texts, *ASKED, "--steps", 4, "--share", 0.5, *SMALL]
    assert run(*base, "--out", tmp_path / "whole")[0] == 0
    code, told, _ = run(*base, "--out", tmp_path / "parts", "--max-minutes", "1e-6")
    assert code == 0 and "stopped after step 1; go on with --resume" in told
    assert run(*base, "--out", tmp_path / "parts", "--resume")[0] == 0
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = run(*base, "--out", tmp_path / "parts", "--resume", "--noise", "0.5")
    assert code == 2 and "noise" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--serial", 0], "serial and serial_layers must both be 0 or both be more, got serial=0 and serial_layers=2"),
        (["--share", 0], "share must be a number in (0, 1], got 0"),
        (["--activation", "gelu"], "activation must be one of silu, relu, got 'gelu'"),
        (["--length", 5000], "training needs a text of at least 5000 tokens"),
        (["--generate", 5000], "prompts of 96 tokens, 5000 were asked for"),
        (["--answers", "none.jsonl"], "none.jsonl can't be read: No such file"),
        (["--token-loss", -1], "token must be a number of at least 0, got -1"),
        (["--features", "here", "--read-again"], "--features keeps what was read, and --read-again does not"),
        (["--precision", "int8"], "precision must be one of no, bf16, fp16, got 'int8'"),
        (["--draft-vocab", 0], "draft_vocabulary must be a whole number of at least 1, got 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    run: Any, tiny_folder: Path, texts: Path, tmp_path: Path, options: list[Any], message: str
) -> None:
    code, told, err = run("train", "gumiho", "--model", tiny_folder, "--data", texts, "--out", tmp_path / "out",
                          "--length", 24, "--steps", 1, *options)  # fmt: skip
    assert code == 2 and told == "" and message in " ".join(err.split())
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_something_has_to_be_trained_on(run: Any, tiny_folder: Path, texts: Path, tmp_path: Path) -> None:
    base = ["train", "gumiho", "--model", tiny_folder, "--out", tmp_path / "out"]
    code, _, err = run(*base)
    assert code == 2 and "give texts with --data, the model's answers with --answers, or both" in err
    code, _, err = run(*base, "--generate", 3)
    assert code == 2 and "--generate makes prompts of texts: name some with --data" in " ".join(err.split())
    from PIL import Image

    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    code, _, err = run(*base, "--data", tmp_path / "a.png")
    assert code == 2 and "--data must name texts, got images" in err
