"""Notes of a measurement: of the same run alone, and whole."""

from __future__ import annotations

import json
from pathlib import Path

from notes import Notes, read_notes


def test_notes_of_another_run_are_not_used(tmp_path: Path) -> None:
    notes = tmp_path / "r.partial.jsonl"
    notes.write_text(json.dumps({"model": "other"}) + "\n" + json.dumps({"key": "scenes 0", "records": []}) + "\n")
    assert read_notes(notes, {"model": "mine"}) == {} and not notes.exists()
    notes.write_text(json.dumps({"model": "mine"}) + "\n" + json.dumps({"key": "scenes 0", "records": [1]}) + "\nbro")
    assert read_notes(notes, {"model": "mine"}) == {"scenes 0": [1]}
    assert len(notes.read_text().splitlines()) == 2
    notes.write_text("")
    assert read_notes(notes, {"model": "mine"}) == {}


def test_what_was_added_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "a" / "r.partial.jsonl"
    first = Notes(path, {"model": "mine"})
    assert first.done == {}
    first.add("one", [{"x": 1}])
    path.write_text(path.read_text() + '{"key": "two", "rec')  # killed while it wrote the second
    again = Notes(path, {"model": "mine"})
    assert again.done == {"one": [{"x": 1}]}
    again.add("two", [])
    assert Notes(path, {"model": "mine"}).done == {"one": [{"x": 1}], "two": []}
    assert Notes(path, {"model": "other"}).done == {} and json.loads(path.read_text()) == {"model": "other"}
    again.remove()
    assert not path.exists()
