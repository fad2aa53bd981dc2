"""``quickmerge generate text FILE --ask ...``: one reading, an answer to each question."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_text("the sea " * 40, encoding="utf-8")
    return path


ASK = ["--ask", "sea the sea", "--ask", "the", "--max-new-tokens", 4]


def test_every_question_is_answered_from_one_reading(run: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    common = ["generate", "--file", text, "--model", tiny_folder, "--json", tmp_path / "a.json"]
    code, out, err = run(*common, *ASK, "--keep", 0.3, "--layer", 1, "--min-tokens", 0, "--compare",
                         "--save-recipe", tmp_path / "made")  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "a.json").read_text())
    assert out.index("== recipe ==") < out.index("sea the sea") < out.index("== plain ==")
    assert err.count("read once: 80 tokens") == 2
    for way in ("by_recipe", "plain"):
        assert [each["prompt"] for each in found[way]["answers"]] == ["sea the sea", "the"]
        assert found[way]["reading"]["tokens"] == 80
    assert found["by_recipe"]["reading"]["cache_bytes"] < found["plain"]["reading"]["cache_bytes"]
    code, out, err = run(*common, *ASK, "--recipe", tmp_path / "made")
    assert code == 0, err
    again = json.loads((tmp_path / "a.json").read_text())
    assert [a["text"] for a in again["by_recipe"]["answers"]] == [a["text"] for a in found["by_recipe"]["answers"]]


def test_drafted_tokens_alone_merge_nothing(run: Any, tiny_folder: Path, text: Path, tmp_path: Path) -> None:
    code, _, err = run("generate", "--file", text, "--model", tiny_folder, *ASK, "--drafter", "lookup",
                       "--json", tmp_path / "a.json")  # fmt: skip
    assert code == 0, err
    assert "merge" not in json.loads((tmp_path / "a.json").read_text())["recipe"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--ask", "a", "--prompt", "b"], "--prompt must be left out beside --ask"),
        ([], "--prompt must say what to ask, or --ask each of several questions, got neither"),
        (["--ask", " "], "--ask must hold some text, got an empty one"),
    ],
)
def test_what_can_t_be_asked_is_one_sentence(run: Any, tiny_folder: Path, text: Path, args: Any, message: str) -> None:
    code, out, err = run("generate", "--file", text, "--model", tiny_folder, *args)
    assert code == 2 and out == "" and message in err and err.count("\n") == 1, err


def test_a_question_needs_a_document(run: Any, tiny_folder: Path) -> None:
    code, _, err = run("generate", "--model", tiny_folder, "--ask", "a")
    assert code == 2 and "--ask is for questions about a document: give its file too" in err
