"""The rows of a batch job: read from a file or a folder, told apart by place and content; bad ones are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, door, half_character, near_match, need

__all__ = ["COLUMNS", "Columns", "Row", "read_rows"]

COLUMNS = ("prompt", "messages", "text", "document", "content")
"""Where a prompt is looked for if nobody names its column, in this order."""
DATA = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Columns:
    """Which columns hold what.

    Args:
        prompt: a text, or messages of a chat (objects with ``role`` and ``content``); None looks for one of `COLUMNS`.
        question: the column of what is asked about the text in ``prompt``, which is then a document.
        asked: one question about every document, in place of a column.
        id: what a result is called; None is ``id`` where there is such a column, else the row's number.
    """

    prompt: str | None = None
    question: str | None = None
    asked: str | None = None
    id: str | None = None


@dataclass(frozen=True)
class Row:
    """One row of the input.

    Attributes:
        index: its place in the input, from 0 on.
        id: what the user calls it.
        hash: of what is asked, 32 hexadecimal digits.
        prompt: a text or the messages of a chat; the question, where there is a document.
        document: what the question is about, or None.
        error: why it can't be asked, or "".
    """

    index: int
    id: str
    hash: str
    prompt: Any = ""
    document: str | None = None
    error: str = ""

    @property
    def length(self) -> int:
        """Characters, by which rows of about the same length are put together."""
        told = self.prompt if isinstance(self.prompt, str) else "".join(each["content"] for each in self.prompt)
        return len(told) + len(self.document or "")

    def to_json(self) -> str:
        """One line, for a worker."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, line: str) -> Row:
        """What `to_json` made."""
        return cls(**json.loads(line))


def read_rows(path: Path, columns: Columns) -> list[Row]:
    """All rows of a job, the bad ones with the reason.

    Args:
        path: a ``.jsonl`` file of objects, a ``.parquet`` file, a Hugging Face dataset saved to disk, a folder of
            ``.jsonl`` or ``.parquet`` files, or one of texts, each a row with its name as ``id``.
        columns: which columns hold what.

    Raises:
        QuickmergeError: there is nothing at ``path``, it is empty or can't be read, or no row has a column that is
            wanted.
    """
    if not path.exists():
        raise QuickmergeError(f"--input {path} does not exist")
    given = list(_raw(path))
    if not given:
        raise QuickmergeError(f"--input {path} must hold at least one row, got none")
    names = list(dict.fromkeys(name for entry in given if isinstance(entry, dict) for name in entry))
    if not names:
        raise QuickmergeError(
            f'--input {path} must hold objects such as {{"prompt": "..."}}, got none in {len(given):,} rows'
        )
    chosen = _chosen(path, columns, names)
    return [_row(index, entry, chosen) for index, entry in enumerate(given)]


def _chosen(path: Path, columns: Columns, names: list[str]) -> Columns:
    """The columns with every default in its place, each of which some row has."""
    listed = ", ".join(names)
    found = next((name for name in COLUMNS if name in names), None)
    if columns.prompt is None and found is None:
        raise QuickmergeError(
            f"--input {path} must have one of the columns {', '.join(COLUMNS)}, or --column must name another: it has "
            f"{listed}"
        )
    for option, wanted in (("--column", columns.prompt), ("--question", columns.question), ("--id", columns.id)):
        if wanted is not None and wanted not in names:
            raise QuickmergeError(
                f"{option} {wanted!r} is no column of {path}{near_match(wanted, names)}: it has {listed}"
            )
    name = columns.id if columns.id is not None else "id" if "id" in names else None
    return Columns(columns.prompt or found, columns.question, columns.asked, name)


def _row(index: int, entry: dict[str, Any] | str, columns: Columns) -> Row:
    if isinstance(entry, str):  # why it is none
        return Row(index, str(index), _hash(entry), error=entry)
    given = entry.get(columns.id) if columns.id is not None else None
    name = str(index) if given is None else str(given).encode("utf-8", "backslashreplace").decode()
    prompt, document = entry.get(str(columns.prompt)), None
    if columns.question is not None or columns.asked is not None:
        document = prompt
        prompt = columns.asked if columns.question is None else entry.get(columns.question)
    mark = _hash([prompt, document])
    where = columns.question or columns.prompt
    error = _wrong(where, prompt, chat=document is None)
    if document is not None or columns.question is not None or columns.asked is not None:
        error = _wrong(columns.prompt, document, chat=False) or error
    return Row(index, name, mark, error=error) if error else Row(index, name, mark, prompt, document)


def _wrong(column: str | None, value: Any, *, chat: bool) -> str:
    """Why a value is nothing that a model can be asked, or ""."""
    if isinstance(value, str):
        if not value.strip("\ufeff \t\r\n"):
            return f"{column} must hold some text, got an empty one"
        half = half_character(value)
        return "" if half is None else f"{column} must be text of whole characters, got half of one at character {half}"
    if not chat or not isinstance(value, list):
        wanted = "a text or the messages of a chat" if chat else "a text"
        return f"{column} must be {wanted}, got {'nothing' if value is None else 'a ' + type(value).__name__}"
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f"{column} must hold messages with a role and a content, both texts, got something else"
        if half_character(message["content"]) is not None or half_character(message["role"]) is not None:
            return f"{column} must be text of whole characters, got half of one"
    if not any(message["content"].strip() for message in value):
        return f"{column} must hold some text, got messages without any"
    return ""


def _hash(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, default=repr)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# What lies on the disk: objects, or for a row that is none a sentence that says why ---------------------------------


def _raw(path: Path) -> Iterator[dict[str, Any] | str]:
    if path.is_file():
        yield from _file(path)
        return
    if not path.is_dir():
        raise QuickmergeError(f"--input {path} must be a file or a folder")
    if {"dataset_info.json", "state.json"} <= {entry.name for entry in path.iterdir()}:
        yield from _dataset(path)
        return
    if (path / "dataset_dict.json").exists():
        raise QuickmergeError(f"--input {path} holds several splits: name the folder of one of them")
    files = sorted(each for each in path.rglob("*") if each.is_file() and not _hidden(each.relative_to(path)))
    kinds = {each.suffix.lower() if each.suffix.lower() in DATA else "" for each in files}
    if len(kinds) > 1:
        raise QuickmergeError(f"--input {path} must hold rows ({' or '.join(DATA)}) or texts, got files of both kinds")
    for each in files:
        yield from _file(each) if "" not in kinds else [_text(each, each.relative_to(path).as_posix())]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _file(path: Path) -> Iterator[dict[str, Any] | str]:
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        yield from _lines(path)
    elif suffix == ".parquet":
        yield from _parquet(path)
    else:
        raise QuickmergeError(
            f"--input {path} must be a .jsonl or .parquet file, a dataset saved to disk, or a folder of texts"
        )


def _lines(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if number == 1:
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _object(line, number)
    except OSError as error:
        raise QuickmergeError(f"--input {path} can't be read: {error.strerror}") from None


def _object(line: bytes, number: int) -> dict[str, Any] | str:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return f"line {number} must be UTF-8 text, got other bytes"
    except (ValueError, RecursionError):
        return f"line {number} must be JSON, got something else"
    return entry if isinstance(entry, dict) else f"line {number} must be an object, got a {type(entry).__name__}"


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    parquet = need("pyarrow.parquet", "ray", "batch jobs on parquet files")
    with door(f"--input {path} can't be read as parquet"):
        batches = [batch.to_pylist() for batch in parquet.ParquetFile(path).iter_batches()]
    for batch in batches:
        yield from batch


def _dataset(path: Path) -> Iterable[dict[str, Any]]:
    datasets = need("datasets", "datasets", "Hugging Face datasets")
    with door(f"--input {path} can't be read as a dataset"):
        rows: Iterable[Mapping[str, Any]] = datasets.load_from_disk(str(path))
    for row in rows:
        yield dict(row)


def _text(path: Path, name: str) -> dict[str, Any] | str:
    try:
        return {"id": name, "text": path.read_bytes().decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        return f"{name} must be UTF-8 text, got other bytes at offset {error.start}"
    except OSError as error:
        raise QuickmergeError(f"{path} can't be read: {error.strerror}") from None
