"""``quickmerge recipe show`` and ``check``, and commands that take a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import vlm_samples
from transformers import LlamaForCausalLM

import quickmerge as qm


def teach(folder: Path) -> None:
    """Teach the tiny model four texts that read alike for three words, so that having read one is worth something."""
    model = LlamaForCausalLM.from_pretrained(folder).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    rows = torch.tensor([[2, 2, 3, *end] * 16 for end in ([2, 2], [2, 3], [3, 2], [3, 3])])
    for _ in range(40):
        model(rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    qm.Recipe(merge=qm.QuickMerge(keep=0.4), decoding=qm.PromptLookup()).save_pretrained(tmp_path / "recipe")
    return tmp_path / "recipe"


def test_show_prints_and_writes_what_is_told(run: Any, recipe: Path, tmp_path: Path) -> None:
    code, out, err = run("recipe", "show", recipe, "--tokens", 4096, "--json", tmp_path / "t.json")
    assert code == 0, err
    assert "LlamaForCausalLM, 4096 tokens: lossy" in out and "decoding: PromptLookup (lossless)" in out
    data = json.loads((tmp_path / "t.json").read_text())
    assert data["recipe"] == qm.Recipe.from_pretrained(recipe).as_dict() and data["flops"] < data["flops_full"]


def test_check_says_that_it_fits_or_exits_with_one_sentence(
    run: Any, recipe: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    code, out, err = run("recipe", "check", recipe, "--model", tiny_folder)
    assert code == 0, err
    assert out.strip().endswith("tiny: quickmerge keep 0.4 + PromptLookup()") and " fits " in out
    qm.Recipe(visual=qm.SCOPE()).save_pretrained(tmp_path / "visual")
    code, out, err = run("recipe", "check", tmp_path / "visual", "--model", tiny_folder)
    assert code == 2 and out == "" and "visual must be left out for LlamaForCausalLM, a language model" in err
    (recipe / "recipe.json").write_text("{")
    code, out, err = run("recipe", "check", recipe, "--model", tiny_folder)
    assert code == 2 and "can't be understood" in err


# Commands that answer by a recipe, make one of their options, or save it --------------------------------------------

FAST = ["--max-new-tokens", 6, "--prompt", "sea the sea"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the sea " * 40, encoding="utf-8")
    return path


def test_a_saved_recipe_writes_the_same_answer(run: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_folder, "--file", text, *FAST, "--json", tmp_path / "g.json"]
    options = ["--keep", 0.3, "--layer", 1, "--min-tokens", 0, "--attention", "multipole:sink=2:interval=4"]
    code, out, err = run("generate", *common, *options, "--save-recipe", tmp_path / "made")
    assert code == 0, err
    first = json.loads((tmp_path / "g.json").read_text())
    made = qm.Recipe.from_pretrained(tmp_path / "made")
    assert made == qm.Recipe(
        merge=qm.Merge(qm.QuickMerge(keep=0.3), 1, qm.Prefix(min_tokens=0)),
        attention=qm.Multipole(sink=2, interval=4),
    )
    assert first["recipe"] == made.as_dict()
    code, again, err = run("generate", *common, "--recipe", tmp_path / "made", "--compare")
    assert code == 0, err
    assert again.startswith(f"== recipe ==\n{out.strip()}\n") and "== plain ==" in again
    assert "first token " in err and "x as fast" in err
    assert "merge: QuickMerge(keep=0.3" in err and "attention: multipole:" in err
    second = json.loads((tmp_path / "g.json").read_text())
    assert second["recipe"] == first["recipe"]
    read = second["by_recipe"]
    assert read["merge"]["tokens_per_layer"] == first["multipole"]["tokens_per_layer"] and read["tokens"] <= 6
    assert second["plain"]["tokens_per_layer"][1] > read["merge"]["tokens_per_layer"][1]


def test_a_drafter_is_saved_as_a_recipe_and_read_again(run: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    common = ["--model", tiny_folder, "--file", text, *FAST, "--json", tmp_path / "g.json", "--compare"]
    code, out, err = run(
        "generate", *common, "--drafter", "lookup:ngram=2", "--tree", 4, "--save-recipe", tmp_path / "m"
    )
    assert code == 0, err
    assert (
        json.loads((tmp_path / "g.json").read_text())["recipe"] == qm.Recipe.from_pretrained(tmp_path / "m").as_dict()
    )
    code, again, err = run("generate", *common, "--recipe", tmp_path / "m" / "recipe.json")
    assert code == 0, err
    assert "recipe against plain: " in err and "the same text, token for token" in err
    assert json.loads((tmp_path / "g.json").read_text())["by_recipe"]["decoding"]["lossless"]
    assert out.replace("== drafted ==", "== recipe ==") == again


@pytest.mark.parametrize("fewer", [["--keep", 0.3, "--layer", 1, "--min-tokens", 0], []])
@pytest.mark.parametrize("cheaper", [["--attention", "multipole:sink=2:interval=4"], []])
def test_a_drafter_goes_together_with_all_the_rest(
    run: Any, tiny_folder: Path, text: Path, tmp_path: Path, fewer: list[Any], cheaper: list[Any]
) -> None:
    options = [*fewer, *cheaper, "--drafter", "lookup", "--tree", 4]
    common = ["--model", tiny_folder, "--file", text, *FAST, "--json", tmp_path / "g.json", "--compare"]
    code, _, err = run("generate", *common, *options)
    assert code == 0, err
    data = json.loads((tmp_path / "g.json").read_text())
    wanted = {*(["merge"] * bool(fewer)), *(["attention"] * bool(cheaper))}
    assert {name for name in data["recipe"] if name not in ("type", "version", "quickmerge")} == {*wanted, "decoding"}
    assert "lossless" in err


def test_images_are_read_by_options_together_and_by_a_recipe(run: Any, photos: Path, tmp_path: Path) -> None:
    vlm = vlm_samples.save(tmp_path / "vlm")
    data, photo = tmp_path / "g.json", photos / "left" / "0.png"
    common = ["--model", vlm, "--max-new-tokens", 3, "--prompt", "what colour is it ?", "--json", data]
    code, out, err = run("generate", "--image", photo, *common, "--tokens", 5, "--attention", "multipole", "--compare",
                         "--save-recipe", tmp_path / "made")  # fmt: skip
    assert code == 0, err
    assert "16 tokens of 1 image(s), 5 kept" in err and "too few to cluster" in err
    found = json.loads(data.read_text())
    made = qm.Recipe(visual=qm.SCOPE(keep=qm.Count(5)), attention=qm.Multipole())
    assert found["recipe"] == made.as_dict() and qm.Recipe.from_pretrained(tmp_path / "made") == made
    assert found["by_recipe"]["visual"]["visual_kept"] == 5
    code, again, err = run("generate", "--image", photo, *common, "--recipe", tmp_path / "made", "--compare")
    assert code == 0 and again == out, err
    fewer = ["--keep", 0.9, "--text-keep", 0.5, "--min-tokens", 0]
    code, _, err = run("generate", "--image", photo, *common, *fewer)
    assert code == 0, err
    below, above = json.loads(data.read_text())["by_recipe"]["merge+visual"]["tokens_per_layer"]
    assert above < below
    code, _, err = run("generate", "--image", photo, *common, "--tower-keep", 0.7, "--drafter", "lookup")
    assert code == 0, err
    assert set(json.loads(data.read_text())["by_recipe"]) >= {"tower", "decoding"}
    code, _, err = run("generate", "--image", photo, *common, "--drafter", "lookup")
    assert code == 0, err
    assert "visual" not in json.loads(data.read_text())["recipe"]


WRONG = [
    (["--recipe", "made", "--keep", 0.4], "--keep can't be used with --recipe, which says all that is done"),
    (["--recipe", "made", "--drafter", "lookup"], "--drafter can't be used with --recipe"),
    (
        ["--recipe", "nowhere"],
        "recipe must be a folder with recipe.json, or a .json or .yaml file, got nowhere",
    ),
    (["--image", "a.png", "--min-tokens", 4], "--min-tokens is for all tokens of the prompt: give --text-keep too"),
    (["--tree", 4], "--tree is for drafted tokens: give --drafter too"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_one_sentence(run: Any, tiny_folder: Path, options: list[Any], message: str) -> None:
    code, out, err = run("generate", "--model", tiny_folder, *FAST, *options)
    assert code == 2 and out == "" and message in err and err.strip().count("\n") == 0, err


def test_a_recipe_that_does_not_fit_is_one_sentence(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    qm.Recipe(tower=qm.ToMe()).save_pretrained(tmp_path / "tower")
    code, out, err = run("generate", "--model", tiny_folder, *FAST, "--recipe", tmp_path / "tower")
    assert code == 2 and out == "" and "tower must be left out for LlamaForCausalLM" in err


DOCUMENT = "the the sea sea sea " * 300


def test_bench_measures_recipes_beside_the_plain_model(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "long.txt", tmp_path / "b.json"
    path.write_text(DOCUMENT, encoding="utf-8")
    teach(tiny_folder)
    qm.Recipe(attention=qm.Multipole(budget=8, sink=2, interval=4)).save_pretrained(tmp_path / "clusters")
    (tmp_path / "lookup.yaml").write_text("type: quickmerge.recipe\ndecoding: {type: PromptLookup}\n")
    both = ["--recipe", tmp_path / "clusters", "--recipe", tmp_path / "lookup.yaml"]
    common = ["--model", tiny_folder, "--context", 60, "--target", 20, "--json", data]
    code, out, err = run("bench", "text", path, *both, *common, "--max-new-tokens", 4, "--out", tmp_path / "page")
    assert code == 0, err
    rows = json.loads(data.read_text())["rows"]
    assert [row["name"] for row in rows] == ["plain", "clusters", "lookup"]
    assert rows[1]["recipe"] == qm.Recipe.from_pretrained(tmp_path / "clusters").as_dict()
    assert "lookup" in out and (tmp_path / "page" / "report.html").exists()


def test_rows_of_reducers_hold_recipes_too(run: Any, tiny_folder: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "long.txt", tmp_path / "b.json"
    path.write_text(DOCUMENT, encoding="utf-8")
    teach(tiny_folder)
    common = ["--model", tiny_folder, "--context", 60, "--target", 20, "--json", data, "--layer", 1]
    code, _, err = run("bench", "text", path, "--reducer", "quickmerge:pool=3,uniform", "--keep", "0.5", *common)
    assert code == 0, err
    recipes = {row["reducer"]: row["recipe"] for row in json.loads(data.read_text())["rows"]}
    assert list(recipes) == ["quickmerge:pool=3", "uniform"]
    wanted = qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.5, pool=3), 1, qm.Prefix(min_tokens=0)))
    assert recipes["quickmerge:pool=3"] == wanted.as_dict()


BENCHES = [
    (["--recipe", "a", "--keep", "0.4"], "--keep can't be used with --recipe"),
    (["--recipe", "a", "--recipe", "b/a"], "--recipe must give each recipe a name of its own, got 'a' for two ways"),
    (["--recipe", "plain"], "got 'plain' for two ways"),
    (["--recipe", "a", "--max-new-tokens", 1], "--max-new-tokens must be at least 2 with --recipe, got 1"),
]


@pytest.mark.parametrize(("options", "message"), BENCHES)
def test_wrong_options_of_bench_are_one_sentence(run: Any, tmp_path: Path, options: list[Any], message: str) -> None:
    (tmp_path / "long.txt").write_text("the sea " * 700, encoding="utf-8")
    code, out, err = run("bench", "text", tmp_path / "long.txt", *options)
    assert code == 2 and out == "" and message in err and err.strip().count("\n") == 0, err
