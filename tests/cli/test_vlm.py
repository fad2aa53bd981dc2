"""``quickmerge generate``, ``show`` and ``bench`` with a vision-language model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vlm_samples
from PIL import Image

ASK = ["--prompt", "what colour is it ?"]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_samples.save(tmp_path_factory.mktemp("model") / "vlm")


@pytest.fixture
def photo(photos: Path) -> Path:
    return photos / "left" / "0.png"


def test_generate_answers_about_an_image(run, vlm: Path, photo: Path, tmp_path: Path) -> None:
    data = tmp_path / "g.json"
    common = ["--model", vlm, "--max-new-tokens", 4, "--compare", "--json", data]
    code, out, err = run("generate", "--image", photo, *ASK, "--tokens", 5, *common)
    assert code == 0, err
    assert "== reduced ==" in out and "== full ==" in out
    assert "16 tokens of 1 image(s), 5 kept" in err and "prefill:" in err and "cache:" in err
    found = json.loads(data.read_text())
    assert found["reducer"] == "scope" and found["reduced"]["visual"] == [[16, 5]]
    assert found["full"]["tokens_in"] - found["reduced"]["tokens_per_layer"][0] == 11


def test_generate_takes_several_images_and_the_same_share_of_each(run, vlm: Path, photos: Path, tmp_path: Path) -> None:
    data = tmp_path / "g.json"
    images = ["--image", photos / "left" / "0.png", "--image", photos / "right" / "1.png"]
    common = ["--model", vlm, "--max-new-tokens", 2, "--json", data, *ASK]
    for reducer, budget, left in (
        ("tome", ["--keep", 0.5], 8),
        ("trimtokenator", ["--tokens", 3], 3),
        ("scope", [], 4),
    ):
        code, _, err = run("generate", *images, "--reducer", reducer, *budget, *common)
        assert code == 0, err
        found = json.loads(data.read_text())
        assert found["images"] == ["0.png", "1.png"] and found["reduced"]["visual"] == [[16, left]] * 2


def test_generate_reduces_inside_the_language_model(run, vlm: Path, photo: Path, tmp_path: Path) -> None:
    data = tmp_path / "g.json"
    common = ["--model", vlm, "--max-new-tokens", 2, "--json", data, *ASK]
    code, _, err = run("generate", "--image", photo, "--layer", 1, "--keep", 0.25, *common)
    assert code == 0, err
    below, above = json.loads(data.read_text())["reduced"]["tokens_per_layer"]
    assert below - above == 12


def test_more_tokens_than_there_are_means_all_and_is_said(run, vlm: Path, photo: Path) -> None:
    common = ["--model", vlm, "--max-new-tokens", 2, *ASK]
    code, all_, err = run("generate", "--image", photo, "--tokens", 400, *common)
    assert code == 0 and "note: --tokens 400 is more than an image has (16), so that all of its tokens were kept" in err
    code, _, err = run("generate", "--image", photo, "--tokens", 16, *common)
    assert code == 0 and "note" not in err
    assert run("generate", "--image", photo, "--keep", 1, *common)[1] == all_


def test_sampling_is_the_same_with_the_same_seed(run, vlm: Path, photo: Path) -> None:
    common = ["--model", vlm, "--max-new-tokens", 6, "--sample", "--tokens", 6, *ASK]
    outs = [run("generate", "--image", photo, *common, "--seed", seed)[1] for seed in (1, 1, 2, 3, 4)]
    assert outs[0] == outs[1] and len(set(outs)) > 1


@pytest.mark.parametrize("reducer", ["scope", "trimtokenator", "tome", "random"])
def test_show_paints_what_the_language_model_is_given(
    run, vlm: Path, photo: Path, tmp_path: Path, reducer: str
) -> None:
    picture, data = tmp_path / "p.png", tmp_path / "p.json"
    common = ["--model", vlm, "--reducer", reducer, "--tokens", 5, "--figure", picture, "--json", data]
    code, out, err = run("show", "--image", photo, *common, *ASK)
    assert code == 0, err
    assert "5 kept" in out and f"wrote {picture}" in out and Image.open(picture).size[0] == 1200
    (stage,) = json.loads(data.read_text())["stages"]
    groups = np.array(stage["groups"])
    assert groups.shape == (1, 4, 4) and stage["tokens"] == 5 and stage["name"] == "in front of the language model"
    if reducer in ("scope", "trimtokenator"):
        ranks = np.array(stage["ranks"])
        assert sorted(ranks[groups >= 0].tolist()) == [1, 2, 3, 4, 5] and not ranks[groups < 0].any()
    else:
        assert "ranks" not in stage
    assert (groups < 0).any() == (reducer != "tome")


def test_show_goes_by_the_question_where_the_method_does(run, vlm: Path, photo: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.json"
    common = ["--model", vlm, "--tokens", 3, "--figure", tmp_path / "p.png", "--json", data]
    found = {}
    for reducer in ("trimtokenator:aligned=0.2", "scope"):
        for prompt in ("red", "how many shape are there ? left", "blue"):
            code, _, err = run("show", "--image", photo, "--reducer", reducer, "--prompt", prompt, *common)
            assert code == 0, err
            found[reducer, prompt] = json.dumps(json.loads(data.read_text())["stages"])
    assert len({stages for (reducer, _), stages in found.items() if reducer == "scope"}) == 1
    assert len({stages for (reducer, _), stages in found.items() if reducer != "scope"}) > 1


def test_show_paints_what_is_left_inside_the_language_model(run, vlm: Path, photo: Path, tmp_path: Path) -> None:
    data = tmp_path / "p.json"
    common = ["--model", vlm, "--keep", 0.5, "--figure", tmp_path / "p.png", "--json", data, *ASK]
    code, _, err = run("show", "--image", photo, "--reducer", "scope", "--layer", "0,1", *common)
    assert code == 0, err
    (stage,) = json.loads(data.read_text())["stages"]
    assert stage["name"] == "in front of block 1" and stage["tokens"] == 4


def test_bench_measures_right_answers_by_kind(run, vlm: Path, tmp_path: Path) -> None:
    data, report = tmp_path / "b.json", tmp_path / "report"
    folder = vlm_samples.annotated(tmp_path / "scenes", 3)
    settings = ["--reducer", "scope,trimtokenator,random", "--keep", "0.5,0.25", "--limit", 2, "--rounds", 2]
    code, out, err = run("bench", "vlm", folder, "--model", vlm, *settings, "--json", data, "--out", report)
    assert code == 0, err
    found = json.loads(data.read_text())
    rows = found["rows"]
    full, *others = [(row["method"], row["keep"], row["visual_kept"]) for row in rows]
    assert full == ("full", 1.0, 16) and found["meta"]["images"] == 2
    assert {(method, keep): kept for method, keep, kept in others} == {
        (method, keep): 16 * keep
        for method in ("scope", "trimtokenator", "random", "smaller images")
        for keep in (0.5, 0.25)
        if (method, keep) != ("smaller images", 0.5)
    } | {("smaller images", 0.5): 9}
    made = {row["method"]: row.get("recipe", {}).get("visual") for row in rows if row["keep"] in (1.0, 0.25)}
    assert made["full"] is made["smaller images"] is None
    assert made["scope"]["type"] == "SCOPE" and made["scope"]["keep"] == 0.25
    for row in rows:
        assert {kind: told["questions"] for kind, told in row["kinds"].items()} == {"colour": 2, "where": 2}
        right = sum(told["questions"] * told["exact"] for told in row["kinds"].values())
        assert row["exact"] == pytest.approx(right / 4) and row["seconds"] > 0 and row["cache_bytes"] > 0
    told = " ".join(out.split())
    assert "4 questions about 2 images: 2 colour, 2 where" in told and "speed-up" in told
    page = (report / "report.html").read_text(encoding="utf-8")
    assert "trimtokenator" in page and "8 of 16" in page and "Right, by kind of question" in page


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        (
            "generate",
            ["--tokens", "5"],
            "quickmerge generate text has no option --tokens: it belongs to quickmerge generate image",
        ),
        ("generate", ["--image", "PHOTO", "--tokens", "5", "--keep", "0.5"], "give either --keep or --tokens"),
        ("generate", ["--image", "PHOTO", "--keep", "1.5"], "--keep must be a number in (0, 1], got 1.5"),
        (
            "generate",
            ["--image", "PHOTO", "--file", "TEXT"],
            "image has no option --file: it belongs to quickmerge generate text",
        ),
        (
            "generate",
            ["--image", "PHOTO", "--prior", "p"],
            "quickmerge generate image has no option --prior: it belongs to quickmerge generate text",
        ),
        ("generate", ["--image", "PHOTO", "--reducer", "truncate"], "reducer must be one of quickmerge, tome"),
        ("generate", ["--image", "PHOTO", "--reducer", "scop"], "did you mean 'scope'?"),
        (
            "generate",
            ["--image", "PHOTO", "--layer", "2", "--max-new-tokens", "4"],
            "layer must be 0 (behind the projector) or rising blocks",
        ),
        ("generate", ["--image", "PHOTO", "--layer", "first"], "--layer must be a whole number"),
        ("generate", ["--image", "nowhere.png"], "nowhere.png can't be read as an image: No such file or directory"),
        (
            "generate",
            ["--image", "TEXT"],
            "t.txt can't be read as an image: its content is of none of the formats AVIF, BMP",
        ),
        ("generate", ["--image", "BROKEN"], "broken.png can't be read as an image"),
        ("generate", ["--image", "BOMB"], "bomb.png can't be read as an image: it has more than 134 million pixels"),
        ("generate", ["--image", "PHOTO", "--max-new-tokens", "200"], "must fit the model's 128 positions"),
        ("generate", ["--image", "PHOTO", "--model", "BLIND"], "BLIND"),
        ("generate", ["--image", "PHOTO", "--model", "smollm2-135m"], "smollm2-135m"),
        ("bench vlm", ["PHOTOS"], "there is no file"),
        ("bench vlm", ["PHOTO"], "there is no file"),
        ("bench vlm", ["LABELS"], "the folder must hold images with questions, got only labels"),
        ("bench vlm", ["SCENES", "--reducer", "tome,truncate"], "reducer must be one of quickmerge, tome"),
        ("bench vlm", ["SCENES", "--keep", "half"], "--keep must be numbers in (0, 1] with commas"),
        (
            "bench vlm",
            ["SCENES", "--dynamicvit", "d"],
            "vlm has no option --dynamicvit: it belongs to quickmerge bench image",
        ),
        ("bench", ["--image", "SCENES"], "is a vision-language model: measure it with quickmerge bench vlm"),
        (
            "bench vlm",
            ["SCENES", "--layer", "1"],
            "quickmerge bench vlm has no option --layer: it belongs to quickmerge bench tex",
        ),
        (
            "show",
            ["--image", "PHOTO", "--tokens", "16"],
            "nothing was merged: --keep must be below 1, or --tokens below",
        ),
        ("show", ["--image", "PHOTO", "--remove", "3"], "--remove is for vision transformers: leave it out"),
        ("show", ["--image", "PHOTO", "--layer", "7"], "layer must be 0 (behind the projector) or rising blocks"),
    ],
)
def test_bad_input_is_one_sentence(
    run, vlm: Path, tiny_folder: Path, photo: Path, tmp_path: Path, command: str, options: list[str], message: str
) -> None:
    (tmp_path / "t.txt").write_text("no image")
    whole = photo.read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[: len(whole) // 2])
    Image.new("1", (16_000, 10_000)).save(tmp_path / "bomb.png")
    names: dict[str, Any] = {
        "PHOTO": photo, "TEXT": tmp_path / "t.txt", "BROKEN": tmp_path / "broken.png", "BOMB": tmp_path / "bomb.png",
        "BLIND": tiny_folder, "PHOTOS": photo.parent, "SCENES": vlm_samples.annotated(tmp_path / "scenes"),
        "LABELS": tmp_path / "labels",
    }  # fmt: skip
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.png").write_bytes(whole)
    (tmp_path / "labels" / "annotations.jsonl").write_text('{"image": "a.png", "labels": ["dark"]}')
    chosen = [] if "--model" in options else ["--model", vlm]
    ask = ASK if command == "generate" else []
    code, out, err = run(*command.split(), *(names.get(option, option) for option in options), *chosen, *ask)
    assert code == 2 and out == "" and str(names.get(message, message)) in err, err
    assert err.startswith("quickmerge: ") and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_an_image_needs_a_model_that_sees_and_a_question(run, vlm: Path, photo: Path) -> None:
    code, _, err = run("generate", "--image", photo, *ASK)
    assert code == 2 and "Missing option '--model' (see quickmerge generate image --help)" in err
    code, _, err = run("generate", "--image", photo, "--model", vlm, "--prompt", " ")
    assert code == 2 and "--prompt must hold some text, got an empty one" in err
