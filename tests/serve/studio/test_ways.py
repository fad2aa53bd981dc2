"""What the studio says of a recipe is true: the Python, the command and the file all make the very same one."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from studio_samples import DOCUMENT, QUESTION, save_models
from typer.testing import CliRunner

import quickmerge as qm
from quickmerge.serve.studio import Session, Shelf, Teller, Way, answer_text, look, ways_of
from quickmerge.serve.studio.ways import loaded, told_image, told_text, way_called

WAYS = ways_of("smollm2-135m")


def made_by(python: str) -> Any:
    """The recipe that the first lines of a program make, up to the one that loads a model."""
    lines = python.split("\n")
    cut = next(i for i, line in enumerate(lines) if "qm.load" in line)
    found: dict[str, Any] = {}
    exec("\n".join(lines[:cut]), found)
    return found["recipe"]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.label)
@pytest.mark.parametrize("literals", [False, True])
def test_python_and_file_make_the_same_recipe(way: Way, literals: bool, tmp_path: Path) -> None:
    recipe = way.made(0.3, literals)
    told = told_text(way, recipe, "smollm2-135m", "say \"'$(x)\n", 0.3, literals, 8)
    assert made_by(told.python) == recipe
    compile(told.python, "told", "exec")
    (tmp_path / "recipe.json").write_text(told.file)
    assert qm.Recipe.from_pretrained(tmp_path) == recipe
    assert shlex.split(told.command)[5] == "say \"'$(x)\n"


def test_the_command_writes_what_the_page_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quickmerge.cli import app

    shelf = Shelf.of(save_models(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "document.txt").write_text(DOCUMENT)
    for label in ("QuickMerge and prompt lookup", "SnapKV: a smaller cache", "Baseline: truncate"):
        run = answer_text(
            shelf, Session(), Teller(), model="writer", document=DOCUMENT, question=QUESTION, way=label, keep=0.4,
            longest=4, recovery=False,
        )  # fmt: skip
        words = shlex.split(run.told.command)
        done = CliRunner().invoke(app, [*words[1:], "--json", "told.json"])
        assert done.exit_code == 0, done.output
        told = json.loads((tmp_path / "told.json").read_text())
        sides = [each for each in told.values() if isinstance(each, dict) and "text" in each]
        assert [each["text"] for each in sides] == [run.reduced.text, run.plain.text]
        found: dict[str, Any] = {}
        exec(run.told.python, found)
        assert found["found"].text == run.reduced.text


def test_a_saved_recipe_is_offered_as_it_is(tmp_path: Path) -> None:
    shelf = Shelf.of(save_models(tmp_path))
    recipe = qm.Recipe(merge=qm.Merge(qm.ToMe(keep=0.5), mode=qm.Prefix(min_tokens=0)), decoding=qm.PromptLookup())
    recipe.save_pretrained(tmp_path / "recipe")
    way = loaded(str(tmp_path / "recipe"))
    run = answer_text(
        shelf, Session(), Teller(), model="writer", document=DOCUMENT, question=QUESTION, way=way.label, keep=0.1,
        longest=2, recovery=False, further=[way],
    )  # fmt: skip
    assert run.keep is None and run.cells and made_by(run.told.python) == recipe
    assert f"--recipe {tmp_path}/recipe" in run.told.command and "--keep" not in run.told.command
    qm.Recipe(visual=qm.SCOPE(keep=0.5)).save_pretrained(tmp_path / "visual")
    with pytest.raises(qm.QuickmergeError, match="--recipe must be one for texts"):
        loaded(str(tmp_path / "visual"))


@pytest.mark.parametrize(("kind", "method"), [("vision", "tome"), ("vision", "quickmerge"), ("vlm", "scope")])
def test_a_recipe_for_images_is_told(kind: str, method: str, tmp_path: Path) -> None:
    recipe, told = told_image(kind, "some model", method, 0.5, "what is it ?", 4)
    assert made_by(told.python) == recipe
    (tmp_path / "recipe.json").write_text(told.file)
    assert qm.Recipe.from_pretrained(tmp_path) == recipe
    assert "'some model'" in told.command


def test_the_program_for_images_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from studio_samples import image

    shelf = Shelf.of(save_models(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "image.png").write_bytes(image())
    given: dict[str, Any] = {"images": [image()], "keep": 0.5, "question": "which colour ?", "longest": 2}
    seen = look(shelf, Session(), Teller(), model="seer", method="tome", **given)
    assert seen.told is not None
    found: dict[str, Any] = {}
    exec(seen.told.python, found)
    assert round(found["run"].summary()["tower"].tokens_per_block[-1]) == seen.kept
    asked = look(shelf, Session(), Teller(), model="asked", method="scope", **given)
    assert asked.told is not None and asked.reduced is not None
    exec(asked.told.python, found)
    assert found["found"].text == asked.reduced.text


def test_an_unknown_way_names_those_that_there_are() -> None:
    with pytest.raises(qm.QuickmergeError, match="the recipe must be one of QuickMerge, "):
        way_called("<b>", WAYS)
    assert "trained prior" not in " ".join(way.label for way in ways_of("another"))
