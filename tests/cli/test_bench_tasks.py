"""``quickmerge bench tasks``: rows, files and refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hosts_zoo import build
from tokenizer_samples import byte_level
from typer.testing import CliRunner

from quickmerge.cli import app
from quickmerge.errors import QuickmergeError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("models") / "tiny"
    build("llama", vocab_size=420).save_pretrained(made)
    byte_level().save_pretrained(made)
    return made


def call(*args: Any) -> Any:
    return CliRunner().invoke(app, ["bench", "tasks", *map(str, args)], catch_exceptions=False)


def test_it_measures_prints_and_writes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("Nobody came, and the evening went on. " * 60)
    done = call(
        "--model", folder, "--tasks", "needle,labels", "--tokens", 400, "--seeds", "0:2", "--keep", "0.3,0.6",
        "--reducer", "quickmerge:pool=3,random", "--layer", 1, "--documents", tmp_path / "text.txt", "--mode", "later",
        "--records", tmp_path / "r.jsonl", "--json", tmp_path / "found.json", "--out", tmp_path / "page",
    )  # fmt: skip
    assert done.exit_code == 0 and "quickmerge:pool=3 0.3" in done.output and "random 0.6" in done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["meta"]["dtype"] == "bfloat16" and found["meta"]["mode"] == "later" and len(found["rows"]) == 15
    assert found["rows"][1]["recipe"]["merge"]["reducer"]["pool"] == 3
    assert len(found["prompts"]) == len((tmp_path / "r.jsonl").read_text().splitlines()) == 5 * 2 * (1 + 4)
    assert (tmp_path / "page" / "report.html").is_file()


def test_recipes_are_measured_by_their_names(folder: Path, tmp_path: Path) -> None:
    import quickmerge as qm

    qm.Recipe(merge=qm.Merge(qm.Random(keep=0.5), 1, qm.Prefix(min_tokens=0))).save_pretrained(tmp_path / "half")
    done = call("--model", folder, "--tasks", "needle", "--tokens", 300, "--seeds", 3, "--recipe", tmp_path / "half",
                "--json", tmp_path / "found.json")  # fmt: skip
    assert done.exit_code == 0
    assert [row["name"] for row in json.loads((tmp_path / "found.json").read_text())["rows"]] == ["plain", "half"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--tasks", "needel"], r"--tasks must be one of needle, .*got 'needel' \(did you mean 'needle'\?\)"),
        (["--format", "chatty"], r"--format must be one of cue, bare, chat, got 'chatty'"),
        (["--mode", "late"], r"--mode must be one of last, first, both, later, got 'late'"),
        (["--dtype", "int4"], r"--dtype must be one of float32, bfloat16, float16, int8, auto, got 'int4'"),
        (["--seeds", "3:3"], r"--seeds must be two numbers, the first one smaller \(0:12\), or one, got '3:3'"),
        (["--seeds", "a"], r"--seeds must be two numbers"),
        (["--keep", "2"], r"--keep must be a number in \(0, 1\], got 2"),
        (["--recipe", "x.json", "--keep", "0.5"], r"x\.json"),
        (["--documents", "/nowhere.txt"], r"/nowhere\.txt"),
    ],
)
def test_bad_options_are_told_before_anything_is_loaded(args: list[str], message: str) -> None:
    with pytest.raises(QuickmergeError, match=message):
        call(*args)
