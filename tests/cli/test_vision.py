"""``quickmerge show image``, ``show video`` and ``bench image``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from video_samples import write_frames

pytest.importorskip("av")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """Twelve frames of a square that moves."""
    frames = np.full((12, 48, 48, 3), 40, dtype=np.uint8)
    for t, frame in enumerate(frames):
        frame[8:24, 2 * t : 2 * t + 16] = (200, 120, 40)
    return write_frames(tmp_path / "clip.mp4", frames, fps=8)


def test_show_paints_an_image(run, tiny: Path, photos: Path, tmp_path: Path) -> None:
    picture, data = tmp_path / "p.png", tmp_path / "p.json"
    settings = ["--model", tiny, "--reducer", "tome", "--remove", "2,3"]
    code, out, err = run("show", "--image", photos / "left" / "0.png", *settings, "--figure", picture, "--json", data)
    assert code == 0, err
    assert "17 tokens in" in out and f"wrote {picture}" in out
    assert Image.open(picture).size[0] == 1200
    stages = json.loads(data.read_text())["stages"]
    assert [(s["name"], s["tokens"]) for s in stages] == [("block 1", 15), ("block 2", 12)]
    assert np.array(stages[0]["groups"]).shape == (1, 4, 4)


@pytest.mark.parametrize("budget", [["--keep", 0.25], ["--tokens", 4]])
def test_show_paints_the_order_in_which_patches_were_chosen(
    run, tiny: Path, photos: Path, tmp_path: Path, budget: list[Any]
) -> None:
    picture, data = tmp_path / "p.png", tmp_path / "p.json"
    common = ["--model", tiny, "--reducer", "scope", *budget, "--figure", picture, "--json", data]
    code, out, err = run("show", "--image", photos / "left" / "0.png", *common)
    assert code == 0, err
    (stage,) = json.loads(data.read_text())["stages"]
    groups, ranks = np.array(stage["groups"]), np.array(stage["ranks"])
    assert stage["name"] == "block 3" and stage["tokens"] == 5  # of four blocks the last but one; a class token
    assert sorted(ranks[groups >= 0].tolist()) == [1, 2, 3, 4] and not ranks[groups < 0].any()
    assert Image.open(picture).size[0] == 1200 and "17 after blocks 0-1, 5 after blocks 2-3" in out


def test_show_tells_tokens_from_shares_for_every_method(run, tiny: Path, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.json"
    common = ["--model", tiny, "--figure", tmp_path / "p.png", "--json", data]
    for reducer in ("tome", "random", "pool"):
        code, _, err = run("show", "--image", photos / "left" / "0.png", "--reducer", reducer, "--tokens", 6, *common)
        assert code == 0, err
        (stage,) = json.loads(data.read_text())["stages"]
        assert stage["tokens"] == 7 and "ranks" not in stage


def test_show_names_the_image_itself(run, tiny: Path, photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("show", "--image", photos / "left" / "0.png", "--model", tiny, "--keep", 0.6)
    assert code == 0, err
    assert (tmp_path / "0-quickmerge.png").is_file()


def test_show_paints_a_video(run, tiny: Path, clip: Path, tmp_path: Path) -> None:
    picture, animation = tmp_path / "v.png", tmp_path / "v.webp"
    settings = ["--model", tiny, "--frames", 4, "--stride", 2, "--keep", 0.25]
    code, out, err = run("show", "--video", clip, *settings, "--figure", picture, "--animation", animation)
    assert code == 0, err
    assert "16 of 64 tokens left of 4 frames" in out
    assert Image.open(picture).size[0] > 300 and getattr(Image.open(animation), "n_frames", 1) == 4


def test_bench_measures_features_and_labels(run, tiny: Path, classifier: Path, photos: Path, tmp_path: Path) -> None:
    data, report = tmp_path / "b.json", tmp_path / "report"
    common = [
        "--reducer",
        "tome,random",
        "--flops",
        "0.7",
        "--limit",
        6,
        "--rounds",
        2,
        "--json",
        data,
        "--out",
        report,
    ]
    code, out, err = run("bench", "--image", photos, "--model", tiny, *common)
    assert code == 0, err
    rows = json.loads(data.read_text())["rows"]
    assert [row["method"] for row in rows] == ["full", "tome", "random", "smaller images"]
    assert all("accuracy" not in row and row["images"] == 6 and row["speedup"] > 0 for row in rows)
    made = {row["method"]: row.get("recipe", {}).get("tower") for row in rows}
    assert made["full"] is made["smaller images"] is None
    assert made["tome"]["reducer"]["type"] == "ToMe" and made["tome"]["layer"]["type"] == "Removal"
    assert "FLOPs" in (report / "report.html").read_text()
    code, out, err = run("bench", "--image", photos, "--model", classifier, *common)
    assert code == 0, err
    rows = json.loads(data.read_text())["rows"]
    assert all(0 <= row["accuracy"] <= 1 for row in rows) and rows[0]["agreement"] == 1 and "accuracy" in out


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("show", ["--image", "PHOTO", "--reducer", "truncate"], "reducer must be one of"),
        ("show", ["--image", "PHOTO", "--remove", "x"], "--remove must be tokens per block"),
        ("show", ["--image", "PHOTO", "--remove", "1,2,3,4,5"], "at most 4 numbers"),
        ("show", ["--image", "PHOTO", "--remove", "3", "--layer", "1"], "give either --remove or --layer, got both"),
        ("show", ["--image", "PHOTO", "--figure", "p.svg"], "--figure must end in .png or .webp"),
        ("show", ["--image", "PHOTO", "--keep", "1"], "nothing was merged"),
        (
            "show",
            ["--image", "PHOTO", "--html", "p.html"],
            "show image has no option --html: it belongs to quickmerge show text",
        ),
        ("show", ["--image", "PHOTO", "--tokens", "16"], "--tokens must be below the 16 patches of the image, got 16"),
        (
            "show",
            ["--image", "PHOTO", "--tokens", "4", "--keep", "0.5"],
            "give either --keep or --tokens, got 0.5 and 4",
        ),
        ("show", ["--image", "PHOTO", "--tokens", "4", "--remove", "3"], "give either --remove or --tokens, got both"),
        ("show", ["--image", "PHOTO", "--prompt", "What is it?"], "--prompt is for vision-language models"),
        (
            "show",
            ["--image", "PHOTO", "--reducer", "trimtokenator:norm=1"],
            "trimtokenator goes by a question to a lang",
        ),
        (
            "show",
            ["--image", "PHOTO", "--reducer", "scope", "--keep", "1.5"],
            "--keep must be a number in (0, 1], got 1.5",
        ),
        (
            "show",
            ["--text", "sea", "--tokens", "4"],
            "quickmerge show text has no option --tokens: it belongs to quickmerge show image",
        ),
        (
            "show",
            ["--video", "CLIP", "--prompt", "What?"],
            "quickmerge show video has no option --prompt: it belongs to quickmerge show image",
        ),
        ("show", ["--image", "nowhere.png"], "nowhere.png can't be read as an image: No such file or directory"),
        ("show", ["--image", "BROKEN"], "broken.png can't be read as an image: "),
        ("show", ["--image", "BOMB"], "bomb.png can't be read as an image: it has more than 134 million pixels"),
        ("show", ["--image", "TEXT"], "can't be read as an image"),
        (
            "show",
            ["--image", "PHOTO", "--video", "PHOTO"],
            "quickmerge show image has no option --video: it belongs to quickmerge show video",
        ),
        ("show", ["--video", "nowhere.mp4"], "there is no such file"),
        ("show", ["--video", "CLIP", "--frames", "40"], "at least 160 frames"),
        (
            "bench",
            ["--image", "PHOTOS", "--reducer", "tome,trimtokenator"],
            "trimtokenator goes by a question to a lang",
        ),
        ("bench", ["--image", "PHOTOS", "--flops", "2"], "--flops must be a number in"),
        ("bench", ["--image", "PHOTOS", "--keep", "0.7"], "give the share of the FLOPs as --flops 0.7"),
        ("bench", ["--image", "PHOTOS", "--flops", "0.05"], "ratio must be one that"),
        (
            "bench",
            ["--image", "PHOTOS", "--layer", "2"],
            "quickmerge bench image has no option --layer: it belongs to quickmerge bench text",
        ),
        (
            "bench",
            ["--image", "PHOTOS", "--text", "TEXT"],
            "bench image has no option --text: it belongs to quickmerge bench te",
        ),
        ("bench", [], "Missing argument 'FILES'"),
    ],
)
def test_bad_input_is_one_sentence(
    run, tiny: Path, photos: Path, clip: Path, tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    (tmp_path / "t.txt").write_text("no image")
    whole = (photos / "left" / "0.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (16_000, 10_000)).save(tmp_path / "bomb.png")
    names = {
        "PHOTO": photos / "left" / "0.png", "PHOTOS": photos, "TEXT": tmp_path / "t.txt", "CLIP": clip,
        "BROKEN": tmp_path / "broken.png", "BOMB": tmp_path / "bomb.png",
    }  # fmt: skip
    code, _, err = run(command, *(names.get(option, option) for option in options), "--model", tiny)
    assert code == 2 and message in err and err.startswith("quickmerge: ") and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.tmp"))
