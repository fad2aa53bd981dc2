"""Records of long work: what was written is there again, whatever moment the writer was killed at."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.bench.records import Records
from quickmerge.errors import QuickmergeError

SETTINGS = {"model": "m", "tokens": 8}
KEY = ("task", "seed")


def test_what_was_added_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "records.jsonl"
    records = Records(path, SETTINGS, KEY)
    records.add({"task": "a", "seed": 0, "nll": 0.5})
    records.add({"task": "a", "seed": 1, "nll": 1.5})
    again = Records(path, SETTINGS, KEY)
    assert again.get("a", 1) == {"task": "a", "seed": 1, "nll": 1.5}
    assert again.get("a", 2) is None and again.get("b", 0) is None


def test_records_of_other_settings_stay_and_are_not_taken_for_these(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, SETTINGS, KEY).add({"task": "a", "seed": 0})
    other = Records(path, {**SETTINGS, "tokens": 9}, KEY)
    assert other.get("a", 0) is None
    other.add({"task": "a", "seed": 0, "nll": 2.0})
    assert Records(path, SETTINGS, KEY).get("a", 0) == {"task": "a", "seed": 0}
    assert len(path.read_text().splitlines()) == 2


def test_settings_are_compared_as_json_has_them(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, {"layers": (1, 2)}, KEY).add({"task": "a", "seed": 0})
    assert Records(path, {"layers": [1, 2]}, KEY).get("a", 0) is not None


@settings(max_examples=25, deadline=None)
@given(cut=st.integers(0, 400), text=st.text(max_size=12))
def test_a_kill_at_any_moment_loses_at_most_the_record_it_came_in(
    cut: int, text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    whole = Records(path, SETTINGS, KEY)
    made = [{"task": text, "seed": seed} for seed in range(4)]
    lines = []
    for each in made:
        whole.add(each)
        lines.append(len(path.read_bytes()))
    path.write_bytes(path.read_bytes()[:cut])
    left = sum(end <= cut for end in lines)
    again = Records(path, SETTINGS, KEY)
    assert [again.get(text, seed) is not None for seed in range(4)] == [seed < left for seed in range(4)]
    for each in made[left:]:
        again.add(each)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert found == [{"settings": SETTINGS, **each} for each in made]


@pytest.mark.parametrize("line", ["x", "[]", '{"settings": {"model": "m", "tokens": 8}}', "{}", '"settings"'])
def test_a_file_of_something_else_is_refused_by_its_line(line: str, tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    Records(path, SETTINGS, KEY).add({"task": "a", "seed": 0})
    before = path.read_text() + line + "\n"
    path.write_text(before)
    with pytest.raises(QuickmergeError, match=r"records\.jsonl must hold records, got something else on line 2$"):
        Records(path, SETTINGS, KEY)
    assert path.read_text() == before


def test_a_path_that_can_t_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QuickmergeError, match=r"records\.jsonl can't be written"):
        Records(tmp_path / "file" / "records.jsonl", SETTINGS, KEY)


def test_without_a_file_records_are_kept_in_memory() -> None:
    records = Records(None, SETTINGS, KEY)
    records.add({"task": "a", "seed": 0})
    assert records.get("a", 0) == {"task": "a", "seed": 0}
