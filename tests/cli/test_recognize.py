"""``quickmerge train recognizer`` and ``quickmerge recognize`` on tiny models and images of two colours."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scene_samples import save_models, small_recognizer, write_scenes

from quickmerge.errors import FetchError
from quickmerge.recognition.sentence import SentenceEncoder

SMALL = ["--batch", 9, "--blocks", 2, "--save-every", 50]


@pytest.fixture
def recognizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A recogniser that was never trained."""
    small_recognizer().save_pretrained(tmp_path / "recognizer")
    return tmp_path / "recognizer"


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    return write_scenes(tmp_path / "scenes")


@pytest.fixture
def parts(tmp_path: Path) -> list[object]:
    vision, language = save_models(tmp_path / "models")
    return ["--vision", vision, "--model", language]


def test_train_and_then_recognize(run, parts, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args, **kwargs):
        raise FetchError("pip could not download it")

    monkeypatch.setattr(SentenceEncoder, "load", unreachable)
    out, told_at = tmp_path / "out", tmp_path / "found.json"
    code, told, err = run("train", "recognizer", *parts, "--data", f"{scenes},{scenes}", "--test", scenes, "--out", out,
                          "--steps", 60, "--learning-rate", "0.005", "--vision-layers", "2,4", *SMALL)  # fmt: skip
    assert code == 0, err
    assert "18 images with 3 different labels" in err and "GiB of memory: read once" in err
    assert f"wrote {out}" in told and "exact recall on 9 images:" in told
    assert float(told.split("at 5, ")[1].split(" at 10")[0]) > 0.9
    assert "labels can't be compared by meaning: pip could not download it" in " ".join(err.split())
    code, told, err = run("recognize", scenes / "1.png", scenes / "8.png", "--model", out, "--json", told_at)
    assert code == 0, err
    assert "1.png" in told and "8.png" in told and "probability" in told
    data = json.loads(told_at.read_text())
    first, last = ([row["label"] for row in image["labels"]] for image in data["images"])
    assert {*first[:2]} == {"green square", "red circle"} and last[0] == "blue star"
    assert data["method"] == "one-shot" and data["images"][0]["image"] == "1.png"
    for method in ("best-first", "greedy", "beam"):
        assert run("recognize", scenes / "8.png", "--model", out, "--method", method, "--top", 3)[0] == 0
    code, told, _ = run("recognize", scenes / "8.png", "--model", out, "--minimum", "0.9999")
    assert code == 0 and "8.png: nothing is as probable as asked for (--minimum)" in told
    code, _, err = run("recognize", scenes / "8.png", "--model", out, "--reducer", "tome", "--keep", "0.5",
                       "--json", told_at)  # fmt: skip
    assert code == 0, err
    assert json.loads(told_at.read_text())["keep"] == 0.5


def test_a_list_of_labels_is_scored_whole(run, recognizer: Path, scenes: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.txt"
    labels.write_text("red circle\n\n  blue   star \ncat\n")
    found = tmp_path / "found.json"
    code, told, err = run("recognize", scenes / "0.png", "--model", recognizer, "--labels", labels, "--json", found)
    assert code == 0, err
    assert "share" in told
    rows = json.loads(found.read_text())["images"][0]["labels"]
    assert {row["label"] for row in rows} == {"red circle", "blue star", "cat"}
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    total = sum(row["probability"] for row in rows)
    assert all(row["share"] == pytest.approx(row["probability"] / total) for row in rows)
    assert [row["share"] for row in rows] == sorted((row["share"] for row in rows), reverse=True)
    # With fewer shown, the shares are still those among all.
    code, _, _ = run("recognize", scenes / "0.png", "--model", recognizer, "--labels", labels, "--top", 1, "--json",
                     found)  # fmt: skip
    assert json.loads(found.read_text())["images"][0]["labels"] == rows[:1]


def test_stopped_runs_go_on_to_the_same_weights(run, parts, scenes: Path, tmp_path: Path) -> None:
    base = ["train", "recognizer", *parts, "--data", scenes, "--steps", 3, "--batch", 4, "--blocks", 1]
    base += ["--objective", "reference", "--mask", "prefix"]
    assert run(*base, "--out", tmp_path / "whole", "--read-again")[0] == 0
    code, told, _ = run(*base, "--out", tmp_path / "parts", "--read-again", "--max-minutes", "1e-6")
    assert code == 0 and "stopped after step 1; go on with --resume" in told
    assert run(*base, "--out", tmp_path / "parts", "--read-again", "--resume")[0] == 0
    for name in ("model.safetensors", "language/model.safetensors"):
        one, two = (load_file(tmp_path / which / name) for which in ("whole", "parts"))
        assert all(torch.equal(one[key], two[key]) for key in one), name
    code, _, err = run(*base, "--out", tmp_path / "parts", "--resume", "--objective", "paper")
    assert code == 2 and "objective must be 'reference'" in err


def bomb(path: Path, side: int = 40_000) -> Path:
    """A small PNG file that says it has ``side x side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) +
                     chunk(b"IEND", b""))  # fmt: skip
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["NONE"], "none.png can't be read as an image: No such file or directory"),
        (["TEXT"], "text.png can't be read as an image: its content is of none of the formats AVIF, BMP"),
        (["CUT"], "cut.png can't be read as an image"),
        (["BOMB"], "bomb.png can't be read as an image: it has more than"),
        (["PHOTO", "--labels", "NONE"], "none.png can't be read: No such file or directory"),
        (["PHOTO", "--labels", "EMPTY"], "empty.txt must hold some text, got an empty file"),
        (["PHOTO", "--labels", "TWICE"], "must hold each label once, 'red circle' is in lines 1 and 3"),
        (["PHOTO", "--labels", "COMMA"], "a label must not hold the separator"),
        (["PHOTO", "--labels", "TWICE", "--method", "beam"], "--method chooses how free labels are found"),
        (["PHOTO", "--method", "best"], "--method must be one of one-shot, best-first, greedy, beam, got 'best'"),
        (["PHOTO", "--keep", "0.5"], "--keep needs --reducer"),
        (["PHOTO", "--reducer", "tome", "--keep", "2"], "--keep must be a number in (0, 1], got 2"),
        (["PHOTO", "--reducer", "tomee"], "tomee"),
        (["PHOTO", "--minimum", "1"], "--minimum must be a probability in [0, 1), got 1"),
        (["PHOTO", "--top", "0"], "--top must be a whole number of at least 1, got 0"),
        (["PHOTO", "--model", "SCENES"], "model must be a folder that holds a recognizer"),
        (["PHOTO", "--model", "VISION"], "is of vit: `quickmerge train recognizer` makes one"),
        (["PHOTO", "--model", "NONE"], "model must be a folder that holds a recognizer"),
    ],
)
def test_bad_input_is_one_sentence(
    run, recognizer: Path, scenes: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    photo = scenes / "0.png"
    text = tmp_path / "text.png"
    text.write_text("no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(photo.read_bytes()[:70])
    files = {"empty.txt": "", "twice.txt": "red circle\ncat\nred  circle\n", "comma.txt": "cat, car\n"}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    places = {"PHOTO": photo, "TEXT": text, "CUT": cut, "NONE": tmp_path / "none.png", "SCENES": scenes,
              "EMPTY": tmp_path / "empty.txt", "TWICE": tmp_path / "twice.txt", "COMMA": tmp_path / "comma.txt",
              "VISION": recognizer / "vision"}  # fmt: skip
    if "BOMB" in options:
        places["BOMB"] = bomb(tmp_path / "bomb.png")
    given = [places.get(option, option) for option in options]
    if "--model" not in options:
        given += ["--model", recognizer]
    code, _, err = run("recognize", *given, "--json", tmp_path / "found.json")
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err, err
    assert not (tmp_path / "found.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "NONE"], "there is no file"),
        (["--test", "NONE"], "there is no file"),
        (["--vision-layers", "4,x"], "--vision-layers must be whole numbers with commas (4,8,11), got '4,x'"),
        (["--vision-layers", "9"], "layers must be different whole numbers in -5..4"),
        (["--blocks", "3"], "blocks must be at most 2"),
        (["--mask", "none"], "mask must be one of independent, prefix, causal, got 'none'"),
        (["--mask", "causal"], "objective must be 'reference' for a recognizer with mask='causal'"),
        (["--objective", "papers"], "objective must be one of paper, reference, got 'papers'"),
        (["--prompt", ""], "prompt must be some text"),
        (["--resume"], "nothing to resume"),
        (["--steps", "0"], "steps must be a whole number of at least 1, got 0"),
        (["--model", "VISION"], "is not a causal language model"),
        (["--vision", "LANGUAGE"], "is not a vision model"),
    ],
)
def test_bad_training_settings_are_one_sentence(
    run, parts, scenes: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    places = {"NONE": tmp_path / "none", "VISION": parts[1], "LANGUAGE": parts[3]}
    given = [places.get(option, option) for option in options]
    base = ["train", "recognizer", *parts, "--data", scenes, "--out", tmp_path / "o", "--steps", 2, *SMALL]
    code, _, err = run(*base, *given)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err, err
    assert not (tmp_path / "o" / "config.json").exists()


def test_features_that_do_not_fit_are_read_again(run, parts, scenes: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("quickmerge.console.training.SHARE_OF_MEMORY", 0.0)
    base = ["train", "recognizer", *parts, "--data", scenes, "--steps", 2, *SMALL]
    code, _, err = run(*base, "--out", tmp_path / "o")
    assert code == 0 and "images are read in every step" in " ".join(err.split())
    code, _, err = run(*base, "--out", tmp_path / "p", "--keep-features")
    assert code == 2 and "--keep-features can't be used: the features of 9 images take" in " ".join(err.split())
