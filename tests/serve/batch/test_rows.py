from __future__ import annotations

import json
from pathlib import Path

import pytest
from batch_samples import write_lines

from quickmerge.errors import QuickmergeError
from quickmerge.serve.batch import Columns, Row, read_rows


def test_lines_are_rows_by_place_and_content(tmp_path: Path) -> None:
    given = write_lines(tmp_path / "p.jsonl", [{"id": "a", "prompt": "one"}, {"prompt": "two"}, {"prompt": "one"}])
    rows = read_rows(given, Columns())
    assert [(row.index, row.id, row.prompt, row.error) for row in rows] == [
        (0, "a", "one", ""), (1, "1", "two", ""), (2, "2", "one", ""),
    ]  # fmt: skip
    assert rows[0].hash == rows[2].hash != rows[1].hash
    assert Row.from_json(rows[0].to_json()) == rows[0]


def test_bad_rows_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(
        b'{"prompt": "good"}\n\n{"prompt": 5}\nno json\n{"prompt": " "}\n[1]\n{"other": 1}\n\xff\xfe\n'
        b'{"prompt": "a\\ud800"}\n{"prompt": ["x"]}\n{"prompt": [{"role": "user", "content": "hi"}]}\n'
    )
    rows = read_rows(path, Columns())
    assert [row.index for row in rows] == list(range(10))
    told = [row.error for row in rows]
    assert told[0] == told[9] == ""
    for error, words in zip(
        told[1:9],
        ("got a int", "line 4 must be JSON", "got an empty one", "line 6 must be an object", "got nothing",
         "line 8 must be UTF-8", "half of one", "messages with a role"),
        strict=True,
    ):  # fmt: skip
        assert words in error
    assert rows[9].prompt == [{"role": "user", "content": "hi"}]
    assert len({row.hash for row in rows}) == 10


def test_questions_about_documents(tmp_path: Path) -> None:
    given = write_lines(tmp_path / "p.jsonl", [{"text": "long", "ask": "why?"}, {"text": "long"}, {"ask": "why?"}])
    by_column = read_rows(given, Columns(question="ask"))
    assert (by_column[0].document, by_column[0].prompt) == ("long", "why?")
    assert "ask must be a text" in by_column[1].error
    assert "text must be a text" in by_column[2].error
    same = read_rows(given, Columns(asked="Summarise."))
    assert (same[1].document, same[1].prompt) == ("long", "Summarise.")


def test_a_folder_of_texts_is_named_by_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "sub" / "a.md").write_text("\ufeffay")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (folder / ".hidden").write_text("no")
    rows = read_rows(folder, Columns())
    assert [(row.id, row.prompt) for row in rows if not row.error] == [("b.txt", "bee"), ("sub/a.md", "ay")]
    assert [row.error[:7] for row in rows if row.error] == ["bad.txt"]


@pytest.mark.parametrize("kind", ["parquet", "dataset", "folder"])
def test_tables_are_rows_too(tmp_path: Path, kind: str) -> None:
    import datasets

    messages = [[{"role": "user", "content": text}] for text in ("one", "two")]
    data = datasets.Dataset.from_dict({"messages": messages, "id": [7, 8]})
    path = tmp_path / "in"
    if kind == "dataset":
        data.save_to_disk(str(path))
    else:
        path.mkdir()
        data.to_parquet(str(path / "a.parquet"))
        path = path / "a.parquet" if kind == "parquet" else path
    rows = read_rows(path, Columns())
    assert [(row.id, row.prompt, row.error) for row in rows] == [
        ("7", messages[0], ""), ("8", messages[1], ""),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "columns", "words"),
    [
        (None, Columns(), "does not exist"),
        ("", Columns(), "at least one row"),
        ("no\nno\n", Columns(), "must hold objects"),
        ('{"question": "x"}\n', Columns(), "must have one of the columns prompt.* it has question"),
        ('{"prompt": "x"}\n', Columns(prompt="promt"), "--column 'promt' is no column.*did you mean 'prompt'"),
        ('{"prompt": "x"}\n', Columns(question="ask"), "--question 'ask' is no column"),
        ('{"prompt": "x"}\n', Columns(id="name"), "--id 'name' is no column"),
    ],
)
def test_what_can_not_be_a_job_is_refused(tmp_path: Path, content: str | None, columns: Columns, words: str) -> None:
    path = tmp_path / "p.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(QuickmergeError, match=words):
        read_rows(path, columns)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b")
    with pytest.raises(QuickmergeError, match=r"must be a .jsonl or .parquet file"):
        read_rows(tmp_path / "a.csv", Columns())
    (tmp_path / "b.jsonl").write_text(json.dumps({"prompt": "x"}))
    with pytest.raises(QuickmergeError, match="files of both kinds"):
        read_rows(tmp_path, Columns())
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(QuickmergeError, match="can't be read as parquet"):
        read_rows(tmp_path / "bad.parquet", Columns())
