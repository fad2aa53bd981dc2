"""``quickmerge train classifier`` and ``quickmerge train dynamicvit`` on a tiny model and a folder of images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SMALL = ["--batch", 4, "--save-every", 2, "--no-augment"]


def test_a_classifier_and_then_dynamicvit_on_it(run, tiny: Path, photos: Path, tmp_path: Path) -> None:
    from quickmerge.models import load_vision

    first, out = tmp_path / "first", tmp_path / "dvit"
    code, told, err = run("train", "classifier", "--model", tiny, "--data", photos, "--out", first, "--steps", 20,
                          "--learning-rate", "0.003", "--backbone-rate", 1, "--test", photos, "--batch", 4,
                          "--no-augment")  # fmt: skip
    assert code == 0, err
    assert f"wrote {first}" in told and "12 images of 2 classes" in err
    assert float(told.split("accuracy on 12 images: ")[1]) > 0.9
    model, processor = load_vision(first, task="classify")
    assert model.config.id2label == {0: "left", 1: "right"} and processor.size["height"] == 32
    code, told, err = run("train", "dynamicvit", "--model", first, "--data", photos, "--out", out, "--steps", 3,
                          "--keep", 0.5, "--layers", "1,2,3", "--test", photos, "--precision", "bf16",
                          *SMALL)  # fmt: skip
    assert code == 0, err
    assert "accuracy with every patch on 12 images" in told and "accuracy at keep 0.5 on 12 images" in told
    assert "tokens: 8.5 of 17 a block" in told
    config = json.loads((out / "config.json").read_text())
    assert config["kind"] == "quickmerge-dynamicvit" and config["layers"] == [1, 2, 3]
    load_vision(out / "backbone", task="classify")
    assert not [path for path in out.rglob("*") if path.suffix in (".pt", ".bin", ".pkl")]


def test_stopped_runs_go_on_to_the_same_weights(run, classifier: Path, photos: Path, tmp_path: Path) -> None:
    base = [
        "train",
        "dynamicvit",
        "--model",
        classifier,
        "--data",
        photos,
        "--steps",
        3,
        "--layers",
        "1,2",
        *SMALL[:-1],
    ]
    assert run(*base, "--out", tmp_path / "whole")[0] == 0
    code, told, _ = run(*base, "--out", tmp_path / "parts", "--max-minutes", "1e-6")
    assert code == 0 and "stopped after step 1; go on with --resume" in told
    assert run(*base, "--out", tmp_path / "parts", "--resume")[0] == 0
    for name in ("model.safetensors", "backbone/model.safetensors"):
        one, two = (load_file(tmp_path / which / name) for which in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    code, _, err = run(*base, "--out", tmp_path / "parts", "--resume", "--keep", "0.6")
    assert code == 2 and "keep was 0.7" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--keep", "1.5"], "keep must be a number in (0, 1), got 1.5"),
        (["--layers", "3,x"], "--layers must be whole numbers with commas (3,6,9), got '3,x'"),
        (["--layers", "3,9"], "layers must be rising blocks in 0..3, got (3, 9)"),
        (["--frozen", "2"], "frozen must be a number in [0, 1], got 2.0"),
        (["--ratio-weight", "-1"], "ratio must be a number of at least 0, got -1.0"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--resume"], "nothing to resume"),
        (["--model", "TINY"], "has no classification head"),
        (["--data", "NONE"], "there is no folder"),
        (["--data", "OTHER"], "--data must hold classes that the model knows (left, right), got 'cat', 'dog' in"),
    ],
)
def test_bad_input_is_told_in_one_sentence(
    run, classifier: Path, tiny: Path, photos: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    for old, new in (("left", "cat"), ("right", "dog")):
        (tmp_path / "other" / new).mkdir(parents=True)
        (tmp_path / "other" / new / "0.png").write_bytes((photos / old / "0.png").read_bytes())
    places = {"TINY": tiny, "NONE": tmp_path / "none", "OTHER": tmp_path / "other"}
    options = [str(places.get(option, option)) for option in options]
    base = ["train", "dynamicvit", "--model", classifier, "--data", photos, "--out", tmp_path / "o", "--steps", 2]
    code, _, err = run(*base, *SMALL, *options)
    assert code == 2 and message in " ".join(err.split()), err
    assert not (tmp_path / "o" / "model.safetensors").exists()


def test_the_classifier_command_refuses_what_it_cannot_use(run, tiny: Path, photos: Path, tmp_path: Path) -> None:
    base = ["train", "classifier", "--model", tiny, "--data", photos, "--out", tmp_path / "o", "--steps", 1, *SMALL]
    for options, message in [
        (["--smoothing", "2"], "smoothing must be a number in [0, 1], got 2.0"),
        (["--backbone-rate", "-1"], "backbone_rate must be a number in [0, 1], got -1.0"),
        (["--data", str(photos / "left")], "must hold a folder for each of at least 2 classes"),
        (["--model", str(tmp_path / "nowhere")], "nowhere"),
    ]:
        code, _, err = run(*base, *options)
        assert code == 2 and message in " ".join(err.split()), err
