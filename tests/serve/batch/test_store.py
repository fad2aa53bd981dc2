from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.serve.batch import Row, Store

ROWS = [Row(i, f"r{i}", f"{i:032d}", "x") for i in range(6)]


def settings(**more: Any) -> dict[str, Any]:
    return {"model": "tiny", "seed": 0, "format": "parquet", **more}


def result(row: Row, text: str = "écrit") -> dict[str, Any]:
    return {
        "index": row.index, "id": row.id, "hash": row.hash, "text": text, "tokens_read": 10, "tokens_kept": 4.5,
        "tokens_written": 2, "seconds": 0.1, "finish_reason": "stop",
    }  # fmt: skip


def failed(row: Row) -> dict[str, Any]:
    return {"index": row.index, "id": row.id, "hash": row.hash, "error": "bad"}


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_what_is_written_is_done(tmp_path: Path, format: str) -> None:
    store = Store(tmp_path / "out", settings(format=format))
    store.add([result(ROWS[3]), result(ROWS[1])])
    store.add([])
    store.add_errors([failed(ROWS[4])])
    again = Store(tmp_path / "out", settings(format=format))
    assert again.done(ROWS) == {1, 3, 4}
    again.add([result(ROWS[0])])
    again.add_errors([failed(ROWS[2])])
    assert [path.name for path in again.parts] == [f"results-00000{n}.{format}" for n in (1, 2)]
    assert again.totals() == {"rows": 3, "tokens_read": 30, "tokens_kept": 13.5, "tokens_written": 6}
    lines = (tmp_path / "out" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [2, 4]


def test_parquet_reads_as_a_dataset(tmp_path: Path) -> None:
    import datasets

    store = Store(tmp_path / "out", settings())
    store.add([result(ROWS[1]), result(ROWS[0])])
    store.add([result(ROWS[2])])
    data = datasets.Dataset.from_parquet([str(path) for path in store.parts])
    assert data["id"][:] == ["r0", "r1", "r2"]
    assert data["text"][0] == "écrit"


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    Store(tmp_path / "out", settings())
    with pytest.raises(QuickmergeError, match=r"seed was 0 when .*out was begun and is 1 now: make them the same"):
        Store(tmp_path / "out", settings(seed=1))


def test_another_input_is_refused_and_a_longer_one_taken(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", settings())
    store.add([result(ROWS[1])])
    assert store.done([*ROWS, Row(6, "r6", "f" * 32, "new")]) == {1}
    with pytest.raises(QuickmergeError, match="row 1 is another one"):
        store.done([ROWS[0], ROWS[2]])
    with pytest.raises(QuickmergeError, match="row 1 is missing"):
        store.done(ROWS[:1])


def test_a_folder_of_others_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(QuickmergeError, match=r"it holds 'mine.txt' and no manifest.json"):
        Store(tmp_path, settings())
    with pytest.raises(QuickmergeError, match="must be a folder, got a file"):
        Store(tmp_path / "mine.txt", settings())


def test_damage_is_told(tmp_path: Path) -> None:
    store = Store(tmp_path / "out", settings())
    store.add([result(ROWS[0])])
    store.parts[0].write_bytes(store.parts[0].read_bytes()[:50])
    with pytest.raises(QuickmergeError, match=r"results-000001.parquet is damaged .*its rows are done again"):
        store.done(ROWS)
    (tmp_path / "out" / "manifest.json").write_text("{")
    with pytest.raises(QuickmergeError, match=r"manifest.json is damaged"):
        Store(tmp_path / "out", settings())


def test_a_full_disk_is_one_sentence_and_leaves_no_half_of_a_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "out", settings())

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(QuickmergeError, match=r"can't be written .No space left on device"):
        store.add([result(ROWS[0])])
    monkeypatch.undo()
    assert store.parts == []
    assert Store(tmp_path / "out", settings()).done(ROWS) == set()
