"""``quickmerge calibrate``: what it prints, what it saves, and by which code it ends; and ``--protect literals``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from counting_model import counting_model, documents

import quickmerge as qm


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "counts"
    model, tokenizer = counting_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    for number, text in enumerate(documents(6)):
        (folder / f"{number}.txt").write_text(text, encoding="utf-8")
    (folder / "short.txt").write_text("too short", encoding="utf-8")
    return folder


SHORT = ["--tokens", 280, "--target", 24, "--step", 0.3]


def test_it_saves_a_recipe_that_remembers_and_shows_it(run: Any, counts: Path, mine: Path, tmp_path: Path) -> None:
    out, table, records = tmp_path / "recipe", tmp_path / "t.json", tmp_path / "r.jsonl"
    given = ["calibrate", "--text", mine, "--model", counts, *SHORT, "--floor", 0.5, "--protect", "literals"]
    code, told, err = run(*given, "--out", out, "--json", table, "--records", records)
    assert code == 0, err
    assert "1 of 7 documents have fewer than 1,000 tokens and are left out" in told
    assert "<- chosen" in told and "calibrated: recovery" in told and "recipe.json" in told
    assert "6 documents are too few to hold half of them out" in " ".join(told.split())
    made = qm.Recipe.from_pretrained(out)
    data = json.loads(table.read_text())
    assert made.merge.mode.keeps_literals and made.calibration.floor == 0.5
    assert made.merge.reducer.keep == data["chosen"]["keep"] and data["recipe"] == made.as_dict()
    code, shown, err = run("recipe", "show", out, "--model", counts)
    assert code == 0 and str(made.calibration) in " ".join(shown.split()), err
    assert "literals stay alone" in shown
    size = records.stat().st_size
    assert run(*given, "--records", records)[0] == 0 and records.stat().st_size == size


def test_a_recipe_is_timed_with_or_without_texts(run: Any, counts: Path, mine: Path, tmp_path: Path) -> None:
    """Half of a prompt costs half in this model, whose lower blocks are all that both ways read in full."""
    one, two, table = tmp_path / "one", tmp_path / "two", tmp_path / "t.json"
    qm.Recipe(merge=qm.Merge(qm.Truncate(keep=0.05), layer=1)).save_pretrained(one)
    given = ["calibrate", "--speed", "--model", counts, "--recipe", one, "--out", two, "--json", table]
    code, told, err = run(*given)
    speed = json.loads(table.read_text())["speed"]
    assert code == (3 if speed["tokens"] is None else 0), err  # seconds of this machine say which
    assert "plain over merged prefill" in " ".join(told.split())
    if code == 0:
        made = qm.Recipe.from_pretrained(two)
        assert made.merge.mode.min_tokens == made.break_even.tokens == speed["tokens"]
        assert "break-even: measured" in told and "recipe.json" in told
    else:
        assert not (two / "recipe.json").exists()


def test_where_no_share_will_do_the_code_tells_and_nothing_is_saved(
    run: Any, counts: Path, mine: Path, tmp_path: Path
) -> None:
    code, told, err = run(
        "calibrate", "--text", mine, "--model", counts, *SHORT[:4], "--step", 0.6, "--floor", 1,
        "--reducer", "truncate", "--out", tmp_path / "recipe",
    )  # fmt: skip
    assert code == 3, (told, err)
    assert (
        "no keep below 1 stays above 1: the best is keep" in told and not (tmp_path / "recipe" / "recipe.json").exists()
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--speed", "--text", "x", "--reducer", "snapkv"],
            "--speed is for recipes that merge the text, got cache snapkv",
        ),
        (["--text", "nowhere"], "--text must name files or folders, got nowhere, which is none"),
        (["--floor", "97"], "floor must be a number in (0, 1], got 97"),
        (["--score", "recal"], "score must be recovery, literals, or tasks of"),
        (["--protect", "numbers"], "--protect must be literals, got 'numbers'"),
        (["--dtype", "int4"], "--dtype must be one of float32, bfloat16, float16, int8, auto, got 'int4'"),
        (["--reducer", "snapkv", "--layer", "3"], "--layer is for methods that merge, got snapkv"),
        (["--recipe", "x", "--protect", "literals"], "--protect can't be used with --recipe"),
    ],
)
def test_what_can_t_be_is_one_sentence_and_code_2(run: Any, mine: Path, given: list[str], message: str) -> None:
    code, out, err = run("calibrate", *([] if "--text" in given else ["--text", mine]), *given)
    assert code == 2 and out == "" and message in " ".join(err.split()) and len(err.strip().splitlines()) == 1


def test_bench_text_has_a_column_of_literals(run: Any, counts: Path, mine: Path, tmp_path: Path) -> None:
    given = ["bench", "text", mine / "0.txt", "--model", counts, "--context", 280, "--target", 24, "--keep", 0.5]
    table = tmp_path / "t.json"
    code, out, err = run(
        *given, "--reducer", "truncate,snapkv", "--literals", 3, "--protect", "literals", "--json", table
    )
    assert code == 0, err
    data = json.loads(table.read_text())
    assert "literals" in out and all(row["literals_asked"] == 3 for row in data["rows"])
    merge, cache = (qm_recipe(row) for row in sorted(data["rows"], key=lambda row: row["reducer"], reverse=True))
    assert merge["merge"]["mode"]["protect"] == "literals" and cache["cache"]["protect"] == "literals"
    assert all(record["literal_tokens"] > 0 for record in data["documents"])


def qm_recipe(row: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = row["recipe"]
    return made


def test_protect_beside_what_it_is_not_for(run: Any, mine: Path) -> None:
    code, _, err = run(
        "generate", "text", mine / "0.txt", "--prompt", "so", "--drafter", "lookup", "--protect", "literals"
    )
    assert code == 2 and "--protect is for tokens that are merged or leave the cache" in " ".join(err.split())
