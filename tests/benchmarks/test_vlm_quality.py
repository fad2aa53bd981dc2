"""The benchmark of vision-language models goes on where it was broken off, and writes whole results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tables
import vlm_quality as script
from answer_samples import tiny_vlm
from PIL import Image


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("vlm")
    network, processor = tiny_vlm()
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def start(tmp_path, model, monkeypatch) -> Callable[..., int]:
    for name, count in (("scenes", 3), ("mosaics", 2)):
        (tmp_path / name).mkdir()
        lines = []
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.png")
            asked = [{"kind": "count", "question": "how many star ?", "answer": "2"}] * (1 + number)
            lines.append(json.dumps({"image": f"{number}.png", "questions": asked}))
        (tmp_path / name / "annotations.jsonl").write_text("\n".join(lines))

    def start(*more: object) -> int:
        given = ["--model", model, "--scenes", tmp_path / "scenes", "--mosaics", tmp_path / "mosaics"]
        given += ["--reducer", "random,scope", "--keep", 0.5, "--rounds", 1, "--out", tmp_path / "out" / "r.json"]
        monkeypatch.setattr(sys, "argv", ["vlm_quality.py", *map(str, given), *map(str, more)])
        return script.main()

    return start


def test_a_run_that_was_broken_off_goes_on(start, tmp_path, monkeypatch) -> None:
    answered: list[str] = []
    real = script.answer_records

    def counted(model: Any, processor: Any, picture: Any, *rest: Any) -> Any:
        if len(answered) == 4:
            raise KeyboardInterrupt
        answered.append(f"{picture.path.parent.name} {picture.path.stem}")
        return real(model, processor, picture, *rest)

    monkeypatch.setattr(script, "answer_records", counted)
    with pytest.raises(KeyboardInterrupt):
        start()
    out, notes = tmp_path / "out" / "r.json", tmp_path / "out" / "r.partial.jsonl"
    assert not out.exists() and notes.is_file()
    whole = notes.read_text()
    notes.write_text(whole[:-20])  # killed while it wrote the fourth
    answered.clear()
    assert start() == 0
    assert answered == ["mosaics 0", "mosaics 1"] and not notes.exists()
    broken = json.loads(out.read_text())
    monkeypatch.setattr(script, "answer_records", real)
    assert start() == 0
    unbroken = json.loads(out.read_text())
    timed = {"seconds", "prefill_seconds", "reducer_seconds", "tower_seconds", "speedup", "speedup_low", "speedup_high"}

    def plain(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key not in timed} for row in rows]

    assert plain(broken["rows"]) == plain(unbroken["rows"])
    assert [(row["data"], row["method"]) for row in unbroken["rows"]] == [
        (data, name) for data in ("scenes", "mosaics") for name in ("full", "random", "scope", "smaller images")
    ]
    assert [row["questions"] for row in unbroken["rows"]] == [6] * 4 + [3] * 4
    assert unbroken["meta"]["scenes"] == 3 and unbroken["environment"]["torch"]
    # the tables are made of just these
    monkeypatch.setattr(tables, "rows_of", lambda name: unbroken["rows"])
    for table in (tables.vlm_quality, tables.vlm_mosaics, tables.vlm_speed):
        lines = table().markdown().splitlines()
        assert len(lines) == 2 + 4 and lines[2].startswith("| all tokens | 36 |")
        assert len({line.count("|") for line in lines}) == 1


def test_what_is_missing_is_told_in_one_sentence(start, tmp_path, capsys) -> None:
    (tmp_path / "scenes" / "annotations.jsonl").unlink()
    assert start() == 2 and "there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        start("--images", 0)


def test_several_processes_answer_as_one_does(start, tmp_path) -> None:
    rows = []
    for more in ((), ("--processes", 2)):
        assert start(*more) == 0
        found = json.loads((tmp_path / "out" / "r.json").read_text())["rows"]
        rows.append([(row["data"], row["method"], row["exact"], row["visual_kept"]) for row in found])
    assert rows[0] == rows[1]
