"""The benchmark of CALMs goes on where it was broken off, and its tables and figure are made of what it writes."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import calm as script
import calm_figure
import calm_tables
import pytest
from calm_bench_samples import save, texts, tiny_calm, tiny_discrete
from documents import MANIFEST

from quickmerge.calm.cost import autoencoder_training_cost, training_cost

TIMED = ("tokens_per_second", "speedup")


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder, entries = tmp_path / "documents", []
    for number, text in enumerate(texts(4, 70)):
        split = "test" if number < 3 else "dev"
        file = f"{split}/prose/{number}.txt"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
        digest = hashlib.sha256(text.encode()).hexdigest()
        entries.append({"file": file, "kind": "prose", "split": split, "sha256": digest})
    (folder / MANIFEST).write_text(json.dumps({"complete": True, "documents": entries}))
    return folder


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    made = {}
    for name, model, items in (
        ("tokens", tiny_discrete(), 40),
        ("k4", tiny_calm(4), 30),
        ("k2", tiny_calm(2), 20),
        ("k4@50", tiny_calm(4, seed=1), 15),
    ):
        made[name] = save(model, tmp_path / name)
        lines = [{"step": 1, "items": 1, "seconds": 0.5}, {"step": 9, "items": items, "seconds": 4.0}]
        (made[name] / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if name in ("k4", "k2"):
            (made[name] / "autoencoder").mkdir()
            (made[name] / "autoencoder" / "metrics.jsonl").write_text(json.dumps({"items": 7, "seconds": 2.0}) + "\n")
    return made


@pytest.fixture
def start(tmp_path: Path, documents: Path, folders: dict[str, Path], monkeypatch) -> Callable[..., int]:
    def start(*more: object, models: dict[str, Path] = folders) -> int:
        named = ",".join(f"{name}={folder}" for name, folder in models.items())
        given: list[object] = [
            "--models",
            named,
            "--documents",
            documents,
            "--length",
            48,
            "--places",
            8,
            "--samples",
            3,
        ]
        given += [
            "--temperature",
            1,
            0.5,
            "--batches",
            1,
            2,
            "--new",
            6,
            "--rounds",
            2,
            "--notes",
            tmp_path / "notes.jsonl",
        ]
        given += ["--out", tmp_path / "r.json", "--figure", tmp_path / "calm.png"]
        monkeypatch.setattr(sys, "argv", ["calm.py", *map(str, given), *map(str, more)])
        return script.main()

    return start


def test_a_run_that_was_broken_off_goes_on(start, folders, tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []
    real = script.text_terms

    def counted(model: Any, *rest: Any, **more: Any) -> Any:
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append(model.name_or_path.rpartition("/")[2])
        return real(model, *rest, **more)

    monkeypatch.setattr(script, "text_terms", counted)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert not (tmp_path / "r.json").exists() and asked == ["tokens", "k4"]
    asked.clear()
    assert start() == 0
    assert asked == ["k2", "k4@50"] and not (tmp_path / "notes.jsonl").exists()
    broken = json.loads((tmp_path / "r.json").read_text())
    monkeypatch.setattr(script, "text_terms", real)
    assert start() == 0
    whole = json.loads((tmp_path / "r.json").read_text())
    assert broken["rows"] == whole["rows"] and broken["temperatures"] == whole["temperatures"]

    rows = {r["method"]: r for r in whole["rows"]}
    assert list(rows) == ["tokens", "k4", "k2", "k4@50"] and whole["meta"]["against"] == "tokens"
    assert [(s["method"], s["batch"]) for s in whole["speeds"]] == [
        (n, b) for b in (1, 2) for n in ("tokens", "k4", "k2")
    ]
    assert {t["method"] for t in whole["temperatures"]} == {"k4", "k2"}
    assert whole["meta"]["documents"] == [f"test/prose/{n}.txt" for n in range(3)], "none to develop on"
    calm = tiny_calm(4)
    own, frozen = 30 * 48 * training_cost(calm, 48).total, 7 * 16 * 4 * autoencoder_training_cost(calm.autoencoder)
    assert rows["k4"]["train_flops"] == own + frozen and rows["k4"]["train_seconds"] == 6
    assert rows["k4@50"]["train_flops"] == own / 2 + frozen, "its autoencoder is that of the whole run"
    assert rows["tokens"]["train_flops"] == 40 * 48 * training_cost(tiny_discrete(), 48).total
    for name, (result, make, key) in calm_tables.CALM.items():
        if result != "calm":
            continue
        table = make(whole[key])
        assert table.body, name
    first = (tmp_path / "calm.png").read_bytes()
    calm_figure.draw(whole["rows"], tmp_path / "again.png")
    assert first[:4] == b"\x89PNG" and first == (tmp_path / "again.png").read_bytes()


def test_what_does_not_fit_is_told(start, folders, tmp_path: Path, capsys) -> None:
    assert start(models={"k4": folders["k4"]}) == 2
    assert "an ordinary language model to set the CALMs beside" in " ".join(capsys.readouterr().err.split())
    (folders["k2"] / "autoencoder" / "metrics.jsonl").unlink()
    assert start(models={name: folders[name] for name in ("tokens", "k2")}) == 2
    assert "must say how much a model was trained" in " ".join(capsys.readouterr().err.split())
    assert start("--documents", tmp_path / "none") == 2
    assert not (tmp_path / "r.json").exists()
