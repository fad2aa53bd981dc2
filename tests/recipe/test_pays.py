"""``qm.break_even``: the recipe with the length from which on it pays, and what it remembers of that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from counting_model import counting_model

import quickmerge as qm
from quickmerge.errors import QuickmergeError
from quickmerge.merge.run import ObserveRun
from quickmerge.recipe import Measured, PaysFrom

RECIPE = qm.Recipe(merge=qm.Merge(qm.Truncate(keep=0.5), 2, qm.Prefix(recent=4)), decoding=qm.PromptLookup())


@pytest.fixture(scope="module")
def host() -> tuple[Any, Any]:
    return counting_model()


def clock(pays: int) -> Any:
    def seconds(model: Any, prompt: Any, run: Any) -> float:
        with run:
            pass
        return 1.0 if isinstance(run, ObserveRun) else 0.5 if prompt.shape[1] >= pays else 2.0

    return seconds


def found(host: tuple[Any, Any], recipe: Any = RECIPE, pays: int = 60, **more: Any) -> Any:
    return qm.break_even(*host, recipe, shortest=32, longest=128, clock=clock(pays), name="counts", **more)


def test_min_tokens_is_where_it_pays_and_all_else_stays(host: tuple[Any, Any]) -> None:
    made = found(host)
    assert made.tokens == 64 and made.recipe.merge.mode == replace(RECIPE.merge.mode, min_tokens=64)
    assert made.recipe == replace(RECIPE, merge=replace(RECIPE.merge, mode=made.recipe.merge.mode))
    record = made.recipe.break_even
    assert (record.tokens, record.model, record.dtype, record.ratio) == (64, "counts", "float32", 2.0)
    assert "merging pays from prompts of 64 tokens on (2.00x" in str(record)
    model, _ = host
    for tokens, merged in ((63, False), (64, True)):
        ids = host[1]("so " * 200, return_tensors="pt")["input_ids"][:, :tokens]
        with qm.apply(model, replace(made.recipe, decoding=None)) as run:
            model(input_ids=ids)
        stats = run.summary()["merge"]
        assert (stats.tokens_kept < tokens) is merged and ("below min_tokens=64" in str(stats)) is not merged


def test_where_it_never_pays_there_is_no_recipe(host: tuple[Any, Any]) -> None:
    made = found(host, pays=1000)
    assert made.tokens is None and made.recipe is None and "pays at none of these lengths" in str(made)


def test_a_recipe_keeps_the_record_and_another_has_none(host: tuple[Any, Any], tmp_path: Path) -> None:
    made = found(host).recipe
    made.save_pretrained(tmp_path / "r")
    again = qm.Recipe.from_pretrained(tmp_path / "r")
    assert again == made and again.break_even == made.break_even
    assert replace(made, decoding=None).break_even is None
    file = tmp_path / "r" / "recipe.json"
    data = json.loads(file.read_text())
    data["merge"]["mode"]["min_tokens"] = 65
    file.write_text(json.dumps(data))
    with pytest.raises(QuickmergeError, match="break_even is of another recipe"):
        qm.Recipe.from_pretrained(tmp_path / "r")
    data["break_even"]["tokens"] = "many"
    with pytest.raises(QuickmergeError, match=r"break_even\.tokens must be a whole number of at least 1, got 'many'"):
        PaysFrom.from_data(data["break_even"])


def test_a_calibration_stays_where_its_texts_are_still_merged(host: tuple[Any, Any]) -> None:
    for tokens, stays in ((64, True), (63, False)):
        known = Measured(
            RECIPE.label, "m", "recovery", 0.9, 0.95, 9, False, False, tokens, "float32", "ab", 0, "1"
        )  # fmt: skip
        made = found(host, replace(RECIPE, calibration=known)).recipe
        assert (made.calibration is not None) is stays
        assert made.calibration is None or replace(made.calibration, label=known.label) == known


def test_a_recipe_tells_what_was_measured_or_that_nothing_was(host: tuple[Any, Any]) -> None:
    model, _ = host
    plain = qm.Recipe(merge=qm.Truncate(keep=0.5))
    assert "break-even: not measured; shorter prompts than 256 tokens, the default," in str(plain.told(model, 300))
    made = found(host, plain).recipe
    told = made.told(model, 300)
    assert str(made.break_even) in str(told) and told.as_dict()["break_even"] == made.break_even.as_dict()
    assert "break-even" not in str(qm.Recipe(decoding=qm.PromptLookup()).told(model, 300))


def test_what_merges_no_prompt_is_refused(host: tuple[Any, Any]) -> None:
    with pytest.raises(QuickmergeError, match="recipe must merge the text to have a break-even, got PromptLookup"):
        qm.break_even(*host, qm.Recipe(decoding=qm.PromptLookup()))
    with pytest.raises(QuickmergeError, match=r"recipe must be a Recipe, a reducer or a Merge, got 0\.4"):
        qm.break_even(*host, 0.4)
