"""A recipe is read as it was written, in another process too; and a stranger's file is refused in one sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hosts_zoo import build, generate, tokens
from hypothesis import given
from recipe_samples import PARTS, RECIPES, drafts, prior
from strategies import prop

import quickmerge as qm
from quickmerge.merge.reducers import REDUCERS, VISION_REDUCERS, VISUAL_TOKEN_REDUCERS


def through(recipe: qm.Recipe, folder: Path) -> qm.Recipe:
    recipe.save_pretrained(folder)
    return qm.Recipe.from_pretrained(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]()
    found = through(recipe, tmp_path)
    assert found == recipe and repr(found) == repr(recipe)
    assert json.loads((tmp_path / "recipe.json").read_text()) == recipe.as_dict()
    assert os.listdir(tmp_path) == ["recipe.json"]
    assert qm.Recipe.from_pretrained(tmp_path / "recipe.json") == recipe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_what_its_data_say(name: str) -> None:
    recipe = RECIPES[name]()
    assert qm.Recipe.from_dict(recipe.as_dict()) == recipe


def test_data_of_no_file_name_no_folder() -> None:
    assert qm.Recipe.from_dict({"merge": {"type": "QuickMerge", "keep": 0.3}}) == qm.Recipe(
        merge=qm.QuickMerge(keep=0.3)
    )
    with pytest.raises(qm.QuickmergeError, match="recipe has the unknown entry 'merg'"):
        qm.Recipe.from_dict({"merg": {}})
    given = {"merge": {"type": "QuickMergePrior", "prior": {"folder": "merge-prior"}}}
    with pytest.raises(qm.QuickmergeError, match=r"merge\.prior must ship with quickmerge in a recipe of no file"):
        qm.Recipe.from_dict(given)


SHARES = st.floats(0.01, 1.0)
BUDGETS = st.one_of(
    SHARES,
    st.builds(qm.Ratio, SHARES),
    st.builds(qm.Count, st.integers(1, 10**6)),
    st.builds(qm.Mass, SHARES),
    st.builds(qm.Entropy, st.floats(0.1, 9), st.floats(0.01, 0.4), st.floats(0.5, 1)),
)
BLOCKS = st.lists(st.integers(1, 40), min_size=1, max_size=4, unique=True).map(lambda x: tuple(sorted(x)))
SMALL = st.integers(0, 99)
WORDS = {
    "merge": (REDUCERS, st.one_of(st.none(), st.integers(0, 9), BLOCKS, st.builds(qm.Schedule, BLOCKS, SHARES))),
    "visual": (VISUAL_TOKEN_REDUCERS, st.one_of(st.none(), BLOCKS)),
    "tower": (
        VISION_REDUCERS,
        st.one_of(st.builds(qm.Removal, SMALL, st.floats(-1, 1)), st.builds(qm.Removal, st.lists(SMALL).map(tuple))),
    ),
}
MODES = st.one_of(st.none(), st.builds(qm.Prefix, sinks=SMALL, min_tokens=SMALL))


@st.composite
def recipes(draw: st.DrawFn) -> qm.Recipe:
    given: dict[str, Any] = {}
    for name, (table, layers) in WORDS.items():
        if draw(st.booleans()):
            reducer = draw(st.sampled_from(sorted(table)).flatmap(lambda x, table=table: st.builds(table[x], BUDGETS)))
            own = {"merge": {"mode": draw(MODES)}, "visual": {"positions": "consecutive"}, "tower": {"unmerge": True}}
            given[name] = qm.Merge(reducer, draw(layers), **own[name])
    if draw(st.booleans()):
        given["attention"] = qm.Multipole(budget=draw(SMALL), ratio=draw(SHARES), update=draw(st.booleans()))
    if draw(st.booleans()):
        drafter = qm.PromptLookup(ngram=draw(st.integers(1, 9)))
        tree = draw(st.one_of(st.just("auto"), st.integers(1, 99)))
        given["decoding"] = qm.Speculation(drafter, nodes=draw(st.integers(1, 99)), tree=tree)
    return qm.Recipe(**given)


@prop(60)
@given(recipe=recipes())
def test_every_setting_is_read_as_it_was_written(recipe: qm.Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("recipe")
    found = through(recipe, folder)
    assert found == recipe and found.label == recipe.label and found.as_dict() == recipe.as_dict()


def test_a_file_by_hand_has_the_defaults_for_what_it_leaves_out(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "type: quickmerge.recipe\n"
        "merge: {type: QuickMerge, keep: 0.3}\n"
        "attention:\n  type: Multipole\n  budget: 64\n"
        "decoding: {type: Speculation, drafter: {type: PromptLookup}, tree: 8}\n"
    )
    wanted = qm.Recipe(
        qm.QuickMerge(0.3), attention=qm.Multipole(budget=64), decoding=qm.Speculation(qm.PromptLookup(), tree=8)
    )
    assert qm.Recipe.from_pretrained(tmp_path / "mine.yaml") == wanted


# Trained parts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARTS)
def test_trained_parts_lie_beside_the_settings(name: str, tmp_path: Path) -> None:
    make, folder = PARTS[name]
    recipe = make()
    assert through(recipe, tmp_path) == recipe
    assert set(os.listdir(tmp_path)) == {folder, "recipe.json"}
    assert sorted(os.listdir(tmp_path / folder)) == ["config.json", "model.safetensors"]
    assert recipe.as_dict() == json.loads((tmp_path / "recipe.json").read_text())
    # What an earlier recipe has had goes with it, and what is none of ours stays.
    (tmp_path / "notes.txt").write_text("mine")
    assert through(qm.Recipe(), tmp_path) == qm.Recipe()
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "recipe.json"]


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_an_altered_or_missing_part_is_refused(name: str, file: str, tmp_path: Path) -> None:
    make, folder = PARTS[name]
    make().save_pretrained(tmp_path)
    path = tmp_path / folder / file
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(qm.QuickmergeError, match=f"is not what the recipe was written with.*{file} is another file"):
        qm.Recipe.from_pretrained(tmp_path)
    path.unlink()
    with pytest.raises(qm.QuickmergeError, match=f"is missing: there is no file .*{file}"):
        qm.Recipe.from_pretrained(tmp_path)
    for each in (tmp_path / folder).iterdir():
        each.unlink()
    (tmp_path / folder).rmdir()
    with pytest.raises(qm.QuickmergeError, match=f"is missing: there is no folder .*{folder}"):
        qm.Recipe.from_pretrained(tmp_path)


def test_a_part_that_ships_is_named_and_not_copied(tmp_path: Path) -> None:
    trained = qm.Prior.from_pretrained(str(qm.shipped_prior("smollm2-135m")))
    drafter = qm.Gumiho.from_pretrained(str(qm.shipped_gumiho("smollm2-135m")), beam=4)
    recipe = qm.Recipe(merge=qm.QuickMergePrior.from_prior(trained), decoding=drafter)
    assert through(recipe, tmp_path) == recipe
    assert os.listdir(tmp_path) == ["recipe.json"]
    told = json.loads((tmp_path / "recipe.json").read_text())
    assert told["merge"]["prior"]["shipped"] == told["decoding"]["network"]["shipped"] == "smollm2-135m"
    told["merge"]["prior"]["sha256"]["config.json"] = "0" * 64
    (tmp_path / "recipe.json").write_text(json.dumps(told))
    with pytest.raises(qm.QuickmergeError, match=r"merge.prior is not what the recipe was written with.*ships another"):
        qm.Recipe.from_pretrained(tmp_path)


def test_a_prior_by_hand_brings_the_settings_that_it_was_trained_with(tmp_path: Path) -> None:
    prior().save_pretrained(tmp_path)
    text = json.dumps(
        {"type": "quickmerge.recipe", "merge": {"type": "QuickMergePrior", "prior": {"folder": "merge-prior"}}}
    )
    (tmp_path / "mine.json").write_text(text)
    assert "pool=3" in repr(qm.Recipe.from_pretrained(tmp_path / "mine.json"))


def test_the_same_tokens_in_another_process(tmp_path: Path) -> None:
    model, ids = build("llama"), tokens(2, 70)
    recipe = qm.Recipe(
        merge=qm.Merge(qm.QuickMerge(keep=0.5), (1, 3), qm.Prefix(min_tokens=0)),
        attention=qm.Multipole(budget=8, sink=2, interval=4, block=16),
    )
    recipe.save_pretrained(tmp_path)
    with qm.apply(model, recipe):
        wanted = generate(model, ids, 8).sequences.tolist()
    assert wanted != generate(model, ids, 8).sequences.tolist()
    code = (
        "import json, sys, quickmerge as qm\n"
        "from hosts_zoo import build, generate, tokens\n"
        "model = build('llama')\n"
        "with qm.apply(model, qm.Recipe.from_pretrained(sys.argv[1])):\n"
        "    print(json.dumps(generate(model, tokens(2, 70), 8).sequences.tolist()))\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == wanted


# What can't be written ----------------------------------------------------------------------------------------------


class Mine(qm.Uniform):
    """A reducer of a user's own."""


class Own(qm.PromptLookup):
    """A drafter of a user's own."""


UNWRITTEN: list[tuple[qm.Recipe, str]] = [
    (qm.Recipe(merge=qm.Merge(qm.QuickMerge(), mode=qm.Prefix(protect=lambda ids: ids > 0))), "merge.mode.protect must "
     "be None to be saved, since a function can't be written"),
    (qm.Recipe(merge=Mine()), "merge must be one of quickmerge's own to be saved, got a Mine"),
    (qm.Recipe(decoding=Own()), "decoding must be one of quickmerge's own to be saved, got a Own"),
]  # fmt: skip


@pytest.mark.parametrize(("recipe", "message"), UNWRITTEN)
def test_what_cant_be_written_leaves_the_folder_as_it_was(recipe: qm.Recipe, message: str, tmp_path: Path) -> None:
    assert recipe == recipe and recipe != qm.Recipe()
    before = qm.Recipe(merge=qm.QuickMerge())
    before.save_pretrained(tmp_path)
    with pytest.raises(qm.QuickmergeError, match=message):
        recipe.save_pretrained(tmp_path)
    with pytest.raises(qm.QuickmergeError, match=message):
        recipe.as_dict()
    assert qm.Recipe.from_pretrained(tmp_path) == before and os.listdir(tmp_path) == ["recipe.json"]


# A stranger's file --------------------------------------------------------------------------------------------------

GOOD = {"type": "quickmerge.recipe", "version": 1, "quickmerge": "0.1.0"}
MERGE = {"type": "QuickMerge"}
FILES: list[tuple[Any, str]] = [
    ("{", "can't be understood"),
    ("[]", "must hold settings by name, got a list"),
    ({}, 'must hold a recipe \\("type": "quickmerge.recipe"\\), got None'),
    ({"type": "quickmerge.prior"}, "must hold a recipe .*got 'quickmerge.prior'"),
    ({**GOOD, "version": 2, "quickmerge": "9.1"}, "of version 2 of the format, and 1 is the newest that is known: it "
     r"was written by quickmerge 9\.1, and this is \d"),
    ({**GOOD, "version": "1"}, "version must be a whole number of at least 1, got '1'"),
    ({**GOOD, "quickmerge": "9.1", "routing": {}}, "the unknown entry 'routing': it was written by quickmerge 9.1"),
    ({**GOOD, "decodin": None}, r"the unknown entry 'decodin' \(did you mean 'decoding'\?\)"),
    ({**GOOD, "quickmerge": "9.1", "merge": {**MERGE, "heat": 1}}, "the unknown setting 'heat' of QuickMerge: "
     r"it was written by quickmerge 9\.1, and this is"),
    ({**GOOD, "quickmerge": "9.1", "merge": {"type": "Fold"}}, "a known type, got 'Fold': it was written"),
    ({**GOOD, "merge": {"type": "quickmerge"}}, r"got 'quickmerge' \(did you mean 'QuickMerge'\?\)"),
    ({**GOOD, "merge": {"type": "os.system", "command": "true"}}, "merge must be of a known type, got 'os.system'"),
    ({**GOOD, "merge": {"keep": 0.4}}, "merge must be of a known type, got None"),
    ({**GOOD, "merge": {**MERGE, "keep": 1.5}}, r"merge: keep must be a number in \(0, 1\]"),
    ({**GOOD, "merge": {**MERGE, "keep": {"type": "Count", "tokens": 0}}}, "merge.keep: tokens must be a whole number"),
    ({**GOOD, "merge": {**MERGE, "keep": {"type": "Surprise", "prior": {"folder": "merge-keep-prior"}}}},
     "merge.keep must be of a known type, got 'Surprise'"),
    ({**GOOD, "merge": {**MERGE, "keep": {"type": "Count"}}}, "merge.keep.tokens is missing, and Count can't"),
    ({**GOOD, "merge": {**MERGE, "keep": float("nan")}}, "merge.keep must be a finite number, got nan"),
    ({**GOOD, "merge": {**MERGE, "window": "some"}}, "merge: window must be a whole number"),
    ({**GOOD, "merge": {"type": "SCOPE"}}, "merge must be a reducer for the prompt of a language model"),
    ({**GOOD, "merge": {"type": "Multipole"}}, "merge must be a reducer such as"),
    ({**GOOD, "merge": {"type": "Merge"}}, "merge.reducer is missing"),
    ({**GOOD, "merge": {"type": "QuickMergePrior"}}, "merge.prior is missing"),
    ({**GOOD, "merge": {"type": "Merge", "reducer": MERGE, "mode": {"type": "Prefix", "protect": "os.system"}}},
     "merge.mode: protect must be 'literals', a function of input_ids, several of these or None, got 'os.system'"),
    ({**GOOD, "attention": {"type": "Multipole", "budget": -1}}, "attention: budget must be a whole number"),
    ({**GOOD, "decoding": [{"type": "PromptLookup"}]}, "decoding must be a Drafter"),
    ({**GOOD, "decoding": {"type": "Gumiho", "network": "smollm2-135m"}}, "decoding.network must name a trained part"),
    ({**GOOD, "decoding": {"type": "Gumiho", "network": {"shipped": "gpt"}}}, "names a part that does not ship"),
    ({**GOOD, "decoding": {"type": "Gumiho", "network": {"shipped": "../x"}}}, "names a part that does not ship"),
    ({**GOOD, "tower": {"type": "DynamicViT", "predictors": {"shipped": "x"}}}, "none of its kind do"),
    ({**GOOD, "decoding": {"type": "Gumiho", "network": {"folder": "x", "sha256": {"a": "b"}}}}, "there is no folder"),
    ({**GOOD, "visual": json.loads('{"type": "SCOPE", "keep": ' * 40 + "1" + "}" * 40)}, "is nested too deeply"),
    ({**GOOD, "tower": {"type": "Merge", "reducer": {"type": "ToMe"}, "layer": [1] * 10001}}, "more than 10000 values"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FILES)
def test_a_wrong_file_is_one_sentence_that_names_it(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(qm.QuickmergeError, match=message) as error:
        qm.Recipe.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize("name", ["../elsewhere", "/etc", ".", "..", "a/b", "", "A", "elsewhere\0", "link", 3, None])
def test_a_part_lies_beside_its_recipe_and_nowhere_else(name: Any, tmp_path: Path) -> None:
    outside, inside = tmp_path / "elsewhere", tmp_path / "recipe"
    drafts().speculation.drafter.save_pretrained(outside)  # type: ignore[union-attr, attr-defined]
    inside.mkdir()
    (inside / "link").symlink_to(outside)
    spec = {**GOOD, "decoding": {"type": "Gumiho", "network": {"folder": name}}}
    (inside / "recipe.json").write_text(json.dumps(spec))
    with pytest.raises(qm.QuickmergeError, match=r"must lie (in a folder )?beside the recipe"):
        qm.Recipe.from_pretrained(inside)


def test_a_file_of_a_part_that_is_a_link_to_elsewhere_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "recipe"
    drafts().save_pretrained(folder)
    path = folder / "decoding-network" / "model.safetensors"
    path.rename(tmp_path / "weights")
    path.symlink_to(tmp_path / "weights")
    with pytest.raises(qm.QuickmergeError, match="is a link to elsewhere"):
        qm.Recipe.from_pretrained(folder)


HOSTILE = {
    "a tag": "type: quickmerge.recipe\nmerge: !!python/object/apply:os.system ['touch {}']\n",
    "aliases": "a: &a [" + "0," * 90 + "]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{f'*{chr(97 + i)},' * 90}]\n" for i in range(9)
    ) + "type: quickmerge.recipe\n",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_runs_nothing_and_ends(name: str, tmp_path: Path) -> None:
    made = tmp_path / "made"
    (tmp_path / "mine.yaml").write_text(HOSTILE[name].replace("{}", str(made)))
    with pytest.raises(qm.QuickmergeError, match=r"mine.yaml (can't be understood|must hold a recipe, got more than)"):
        qm.Recipe.from_pretrained(tmp_path / "mine.yaml")
    assert not made.exists()


def test_what_is_no_recipe_is_told(tmp_path: Path) -> None:
    with pytest.raises(qm.QuickmergeError, match=r"recipe.json is missing"):
        qm.Recipe.from_pretrained(tmp_path)
    with pytest.raises(qm.QuickmergeError, match="which is none"):
        qm.Recipe.from_pretrained(tmp_path / "none")
    (tmp_path / "recipe.txt").write_text("type: quickmerge.recipe")
    with pytest.raises(qm.QuickmergeError, match=r"or a .json or .yaml file, got .*recipe.txt"):
        qm.Recipe.from_pretrained(tmp_path / "recipe.txt")
