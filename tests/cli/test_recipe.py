"""``quickmerge recipe show`` and ``check``, and commands that take a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import quickmerge as qm


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
