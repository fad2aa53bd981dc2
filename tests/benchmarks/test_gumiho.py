"""The benchmark of drafters goes on where it was broken off, and writes whole results; its prompts are held out."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gumiho as script
import gumiho_tables
import gumiho_theorem
import prompts as prompts_script
import pytest
import torch
from documents import MANIFEST
from transformers import AutoModelForCausalLM

from quickmerge.datasets.prompts import read_prompts
from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import Gumiho

TIMED = {
    "seconds",
    "speedup",
    "speedup_low",
    "speedup_high",
    "tokens_per_second",
    "draft_share",
    "target_share",
    "faster",
}


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Six documents in a folder such as documents.py fills, half of them to develop on."""
    folder, entries = tmp_path / "documents", []
    for number, kind in enumerate(("prose", "technical", "code") * 2):
        split = "test" if number < 3 else "dev"
        file = f"{split}/{kind}/{number}.txt"
        text = " ".join(f"The {split} sea number {n} is {kind}." for n in range(90)) + "\n"
        if kind == "code":
            text = "\n".join(f"def {split}_{n}():\n    return {n}" for n in range(90)) + "\n"
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        entries.append({"file": file, "kind": kind, "split": split, "sha256": digest})
    (folder / MANIFEST).write_text(json.dumps({"complete": True, "documents": entries}))
    return folder


@pytest.fixture
def start(tmp_path: Path, tiny_folder: Path, documents: Path, monkeypatch) -> Callable[..., int]:
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    model.config.max_position_embeddings = 2048
    model.double().save_pretrained(tiny_folder)
    for name, shape in (("both", {"heads": 2}), ("serial", {"heads": 0, "serial": 3})):
        torch.manual_seed(0)
        Gumiho.new(model, serial_layers=1, mlp_depth=2, **shape).save_pretrained(tmp_path / name)

    def start(*more: object) -> int:
        given = ["--model", tiny_folder, "--documents", documents, "--prompts", 3, "--tree-prompts", 2]
        given += ["--max-new-tokens", 6, "--drafters", f"gumiho={tmp_path / 'both'},serial={tmp_path / 'serial'}"]
        given += ["--notes", tmp_path / "notes.jsonl", "--out", tmp_path / "r.json"]
        monkeypatch.setattr(sys, "argv", ["gumiho.py", *map(str, given), *map(str, more)])
        return script.main()

    return start


def test_a_run_that_was_broken_off_goes_on(start, tmp_path: Path, monkeypatch) -> None:
    answered: list[tuple[int, int]] = []
    real = script.draft_records

    def counted(model: Any, tokenizer: Any, prompt: Any, arms: Any, number: int, **rest: Any) -> Any:
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.append((len(arms), number))
        return real(model, tokenizer, prompt, arms, number, **rest)

    monkeypatch.setattr(script, "draft_records", counted)
    # trees of one size alone, since what is chosen by time differs from run to run
    monkeypatch.setattr(script, "draft_arm", lambda name, drafter, tree=4: script_arm(name, drafter, tree))
    with pytest.raises(KeyboardInterrupt):
        start()
    notes = tmp_path / "notes.jsonl"
    assert not (tmp_path / "r.json").exists()
    notes.write_text(notes.read_text()[:-20])  # killed while it wrote the fourth
    answered.clear()
    assert start() == 0
    assert answered == [(8, 0), (8, 1)] and not notes.exists()
    broken = json.loads((tmp_path / "r.json").read_text())
    monkeypatch.setattr(script, "draft_records", real)
    assert start() == 0
    whole = json.loads((tmp_path / "r.json").read_text())
    assert plain(broken["rows"]) == plain(whole["rows"]) and plain(broken["trees"]) == plain(whole["trees"])

    names = ["plain", "lookup (transformers)", "lookup", "gumiho", "serial"]
    assert [(r["temperature"], r["method"]) for r in whole["rows"]] == [(t, n) for t in (0, 1) for n in names]
    assert [r["same"] for r in whole["rows"]] == [3] * 5 + [None] * 5, "every greedy text is that of plain decoding"
    assert [r["method"] for r in whole["trees"]] == [
        "plain", *(f"gumiho, {n} nodes" for n in (4, 8, 16, 32)), "gumiho, auto", "lookup, auto",
        "gumiho, 16 nodes, fta=duplicate", "gumiho, 16 nodes, fta=reference",
    ]  # fmt: skip
    assert [r.get("lossless") for r in whole["trees"]][:-1] == [None] + [True] * 7
    assert len(whole["paired"]) == 2 * 3 and whole["costs"][0]["ratio"] == 1 and len(whole["prompts"]) == 3 * 10
    assert whole["environment"]["torch"] and whole["meta"]["heads"]["serial"]["heads"] == 0
    for make, key in ((make, key) for _, make, key in gumiho_tables.GUMIHO.values()):
        table = make(whole[key])
        assert table.body, make.__name__


script_arm = script.draft_arm


def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs from run to run."""
    return [
        {key: value for key, value in row.items() if key not in TIMED}
        | {"kinds": {kind: found["tokens_per_pass"] for kind, found in row["kinds"].items()}}
        for row in rows
    ]


def test_notes_of_other_heads_are_not_gone_on_with(start, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(script, "draft_rows", lambda records: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        start("--tree-prompts", 0, "--temperature", 0)
    first = (tmp_path / "notes.jsonl").read_text().splitlines()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny")
    Gumiho.new(model, serial_layers=1, mlp_depth=2, heads=2).save_pretrained(tmp_path / "both")
    with pytest.raises(ZeroDivisionError):
        start("--tree-prompts", 0, "--temperature", 0)
    second = (tmp_path / "notes.jsonl").read_text().splitlines()
    assert len(first) == len(second) == 4 and first[0] != second[0]


def test_what_is_missing_is_told_in_one_sentence(start, tmp_path: Path, capsys) -> None:
    for more, message in (
        (["--drafters", f"gumiho={tmp_path / 'nowhere'}"], "draft heads must be a folder with config.json"),
        (["--drafters", "runs/gumiho"], "--drafters must be name=FOLDER with commas, got 'runs/gumiho'"),
        (["--drafters", "lookup=runs/gumiho"], "a name of its own, got 'lookup' again"),
        (["--documents", tmp_path], "are not whole: run benchmarks/documents.py first"),
    ):
        assert start(*more) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert message in said, said
    with pytest.raises(SystemExit):
        start("--prompts", 0)


def test_prompts_are_about_test_documents_alone(documents: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["prompts.py", "--documents", str(documents), "--out", str(tmp_path / "p.jsonl")])
    assert prompts_script.main() == 0
    found = read_prompts(tmp_path / "p.jsonl")
    assert len(found) == 96 and found == prompts_script.held_out_prompts(documents)
    assert found[:16] == prompts_script.held_out_prompts(documents, 16)
    texts = "\n".join(prompt.text for prompt in found)
    assert "test sea" in texts and "test_1" in texts and "dev sea" not in texts and "dev_" not in texts
    (documents / "test" / "prose" / "0.txt").write_text("changed")
    with pytest.raises(QuickmergeError, match="not whole"):
        prompts_script.held_out_prompts(documents)


def test_the_figure_shows_the_formula(tmp_path: Path) -> None:
    gumiho_theorem.draw(tmp_path / "t.png")
    assert (tmp_path / "t.png").read_bytes()[:4] == b"\x89PNG"
    small = 1e-6
    for profile in ((0.8,) * 7, (0.9, 0.6, 0.3), (0.9, 0.1, 0.9)):
        for i, value in enumerate(gumiho_theorem.worth(profile)):
            up, down = list(profile), list(profile)
            up[i] += small
            down[i] -= small
            slope = (gumiho_theorem.expected_accepted(up) - gumiho_theorem.expected_accepted(down)) / (2 * small)
            assert abs(slope - value) < 1e-6
    assert gumiho_theorem.moved((0.5, 0.25, 0.75), 2, 0, 0.25) == [0.75, 0.25, 0.5]
