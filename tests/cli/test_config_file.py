"""``--config`` stands for the options of any command; a training's options are the settings of `TrainingConfig`."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.main import get_command

from quickmerge.cli import app
from quickmerge.console.commands import add
from quickmerge.console.training import Training, make_config, trains
from quickmerge.errors import QuickmergeError
from quickmerge.files import read_settings
from quickmerge.training import TrainingConfig

RECIPES = sorted((Path(__file__).parents[2] / "benchmarks").glob("*.toml"))


def commands() -> dict[str, Any]:
    """Every command by the words that call it."""
    found: dict[str, Any] = {}
    for name, one in get_command(app).commands.items():  # type: ignore[attr-defined]
        found |= (
            {f"{name} {sub}": each for sub, each in one.commands.items()} if hasattr(one, "commands") else {name: one}
        )
    return found


def write(path: Path, settings: dict[str, Any]) -> Path:
    """A file of settings in the language that its name says."""
    if path.suffix == ".toml":
        path.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
    else:
        path.write_text(json.dumps(settings) if path.suffix == ".json" else yaml.safe_dump(settings))
    return path


def test_every_command_takes_a_file() -> None:
    assert [name for name, one in commands().items() if "--config" not in {o for p in one.params for o in p.opts}] == []


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".toml", ".json"])
def test_a_file_says_what_options_say(run, tiny_folder: Path, tmp_path: Path, suffix: str) -> None:
    given = {"model": str(tiny_folder), "tokens": 100, "keep": 0.5, "layer": [1], "json": str(tmp_path / "p.json")}
    code, out, err = run("plan", "--config", write(tmp_path / f"plan{suffix}", given))
    assert code == 0, err
    typed = run("plan", "--model", tiny_folder, "--tokens", 100, "--keep", 0.5, "--layer", 1)
    assert out == typed[1] and json.loads((tmp_path / "p.json").read_text())["keep"] == 0.5
    code, out, _ = run("plan", "--config", tmp_path / f"plan{suffix}", "--keep", 0.25)
    assert code == 0 and json.loads((tmp_path / "p.json").read_text())["keep"] == 0.25, "the command line wins"


def test_arguments_flags_and_several_values_are_in_it_too(run, tiny_folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text("the sea " * 30)
    given = {
        "text": [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], "context": 20, "target": 9, "keep": [0.3, 0.5],
        "model": str(tiny_folder), "layer": 1,
    }  # fmt: skip
    code, _, err = run("bench", "text", "--config", write(tmp_path / "b.yaml", given))
    assert code == 2 and "at least" in err and "tokens" in err  # it is read: the texts are too short
    one = {
        "prompt": "sea",
        "model": str(tiny_folder),
        "compare": True,
        "max-new-tokens": 2,
        "file": str(tmp_path / "a.txt"),
    }
    code, out, err = run("generate", "--config", write(tmp_path / "g.json", one))
    assert code == 0 and "== full ==" in out, err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokns": 3}, "holds an unknown setting 'tokns' (did you mean 'tokens'?)"),
        (
            {"xyz": 3},
            "holds an unknown setting 'xyz': quickmerge plan knows tokens, model, reducer, keep, layer, measure, "
            "dtype, json",
        ),
        ({"config": "x"}, "holds an unknown setting 'config'"),
        ({"tokens": "many"}, "c.yaml: Invalid value for '--tokens': "),
        ({"tokens": [1, 2]}, "c.yaml: Invalid value for '--tokens': "),
        ({"tokens": True}, "tokens must be a number, a text, or a list of them"),
        ({"tokens": {"a": 1}}, "tokens must be a number, a text, or a list of them"),
        ({"keep": 1.5}, "--keep must be a number in (0, 1], got 1.5"),
        ({}, "plan: 7 must hold"),
    ],
)
def test_what_is_wrong_is_one_sentence(run, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "c.yaml", settings)
    if not settings:
        path.write_text("7")
        message = "c.yaml must hold settings by name, got a int"
    code, out, err = run("plan", "--config", path)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err


def test_a_flag_is_true_or_false(run, tmp_path: Path) -> None:
    code, _, err = run("generate", "text", "--config", write(tmp_path / "c.yaml", {"prompt": "x", "compare": "yes"}))
    assert code == 2 and "compare must be true or false, got 'yes'" in err


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "a: [1", "can't be understood"), ("a.yaml", "{" * 5000, "can't be understood"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]", "can't be understood"),
        ("a.yaml", "1: 2", "settings by name"),
        ("a.toml", "a = ", "can't be understood"), ("a.json", "[" * 10**5, "can't be understood"),
        ("a.txt", "a: 1", "must be a .yaml, .toml or .json file"), ("a.yaml", " ", "must hold some text"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_one_sentence(run, tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    code, out, err = run("ls", "--config", tmp_path / name)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err
    assert "No such file" in run("ls", "--config", tmp_path / "none.yaml")[2]


def test_yaml_has_no_hidden_meanings(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "precision: no\nremove: 13:30\nrate: 1e-3\nsteps: 1000\nword: on\nday: 2024-01-02\nzeros: 010\nyes: true\n"
        "none: ~\n"
    )
    assert read_settings(tmp_path / "a.yaml") == {
        "precision": "no", "remove": "13:30", "rate": 1e-3, "steps": 1000, "word": "on", "day": "2024-01-02",
        "zeros": 10, "yes": True, "none": None,
    }  # fmt: skip


# Training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A training command that only says what it was told."""
    told: list[tuple[Training, str]] = []

    @trains(steps=2000, betas=(0.9, 0.95), clip=0.5, warmup=100)
    def trainer(name: str = "x", *, training: Training) -> None:
        """Train nothing."""
        told.append((training, name))

    made = typer.Typer()
    add(made, "trainer", trainer, "Example: trainer")
    made.callback()(lambda: None)
    monkeypatch.setattr("quickmerge.cli.app", made)

    def call(*args: Any) -> tuple[Training, str]:
        code, _, err = run("trainer", *args)
        assert code == 0, err
        return told[-1]

    return call


def test_every_setting_is_an_option_of_every_training(trained) -> None:
    names = {"--" + field.name.replace("_", "-") for field in fields(TrainingConfig)} | {"--config", "--resume"}
    trainings = [one for name, one in commands().items() if name.startswith("train ")]
    assert len(trainings) == 7
    for one in trainings:
        options = {option: param for param in one.params for option in param.opts}
        assert names <= set(options)
        assert all(options[name].help for name in names)


def test_defaults_are_the_command_s_and_then_the_class_s(trained) -> None:
    training, name = trained()
    want = TrainingConfig(
        steps=2000, batch=4, learning_rate=1e-3, warmup=100, save_every=100, betas=(0.9, 0.95), clip=0.5
    )
    assert training.config == want and not training.given and not training.resume and name == "x"
    assert trained("--steps", 20)[0].config.warmup == 20


def test_options_win_over_the_file_and_the_file_over_the_defaults(trained, tmp_path: Path) -> None:
    path = write(tmp_path / "t.toml", {"betas": [0.8, 0.9], "clip": "none", "seed": 3, "name": "y", "resume": True})
    training, name = trained("--config", path, "--seed", 4, "--accumulate", 2)
    assert training.typed == {"seed": 4, "accumulate": 2} and name == "y" and training.resume
    assert training.given == {"betas": (0.8, 0.9), "clip": None, "seed": 4, "accumulate": 2}
    assert training.config.betas == (0.8, 0.9) and training.config.clip is None and training.config.steps == 2000
    assert trained("--config", write(tmp_path / "t.json", {"clip": None}))[0].config.clip is None
    assert trained("--clip", "2.5", "--betas", "0.1,0.2")[0].given == {"clip": 2.5, "betas": (0.1, 0.2)}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipes_say_what_they_said(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """By the command that each is for, whose own defaults must not shine through."""
    made: list[TrainingConfig] = []

    def make(usual: dict[str, Any], given: dict[str, Any]) -> TrainingConfig:
        made.append(make_config(usual, given))
        raise QuickmergeError("seen")

    monkeypatch.setattr("quickmerge.console.training.make_config", make)
    name = path.stem.removesuffix("_autoencoder")
    more = ["--model", "x"] if name == "dynamicvit" else []
    code, _, err = run("train", name, "--data", tmp_path, "--out", tmp_path / "o", *more, "--config", path)
    assert code == 2 and err == "quickmerge: seen\n"
    assert made == [TrainingConfig.from_file(path)]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--betas", "0.9"], "betas must be two numbers in [0, 1), got (0.9,)"),
        (["--betas", "a,b"], "--betas must be numbers with commas (0.9,0.999), got 'a,b'"),
        (["--clip", "never"], "--clip must be a number or none, got 'never'"),
        (["--schedule", "step"], "schedule must be one of constant, linear, cosine, got 'step'"),
        (["--warmup", "9", "--steps", "3"], "warmup must be at most steps (3), got 9"),
    ],
)
def test_a_setting_that_is_not_allowed_is_one_sentence(run, tmp_path: Path, given: list[str], message: str) -> None:
    code, _, err = run("train", "vlm", "--data", tmp_path, "--out", tmp_path / "o", *given)
    assert code == 2 and message in err and err.count("\n") == 1, err


def test_rare_options_are_shown_when_asked_for(run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    short, whole = (run("train", "gumiho", option)[1] for option in ("--help", "--help-all"))
    assert "--warmup" not in short and "--help-all" in short and "--steps" in short
    assert all(option in whole for option in ("--warmup", "--mlp-depth", "--steps", "Example: quickmerge train gumiho"))


@pytest.mark.parametrize("name", commands())
def test_help_fits_a_screen(run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert len(run(*name.split(), "--help")[1].splitlines()) <= 46
