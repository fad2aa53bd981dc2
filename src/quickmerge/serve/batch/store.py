"""The folder of a batch job: what it was asked, what is done, and what can't be done.

``manifest.json`` says by which settings; ``results-000001.parquet`` and so on are parts of the results, each written
whole or not at all; ``errors.jsonl`` holds the rows that can't be answered. A row is done when one of these holds it,
so there is no other record that could disagree, and whoever is killed has lost only what was not yet written.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, door, need
from quickmerge.files import told, write_bytes, write_json
from quickmerge.locks import LOCK
from quickmerge.serve.batch.rows import Row

__all__ = ["FORMATS", "Store"]

FORMATS = ("parquet", "jsonl")
MANIFEST, ERRORS, VERSION = "manifest.json", "errors.jsonl", 1
PART = re.compile(r"results-(\d{6,})\.(parquet|jsonl)")
FIELDS = {
    "index": "int64", "id": "string", "hash": "string", "text": "string", "tokens_read": "int64",
    "tokens_kept": "float64", "tokens_written": "int64", "seconds": "float64", "finish_reason": "string",
}  # fmt: skip
"""Columns of the results, and their types in parquet."""


class Store:
    """What a job has written so far. Only one process writes it at a time; whoever calls this sees to that.

    Args:
        folder: of the job; made if need be.
        settings: all that decides on the results, as JSON holds it; ``format`` among them.
        about: what else is noted in the manifest, of which nothing depends.

    Raises:
        QuickmergeError: the folder is that of another job, or of something else, or can't be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], about: Mapping[str, Any] | None = None) -> None:
        self.folder, self.format = folder, str(settings["format"])
        settings = json.loads(json.dumps(settings))
        check_folder(folder)
        if (folder / MANIFEST).exists():
            _check_same(folder, _manifest(folder)["settings"], settings)
        else:
            write_json(folder / MANIFEST, {"version": VERSION, "settings": settings, **(about or {})})
        self._next = max((_number(path) for path in self.parts), default=0) + 1
        self.errors = self._read_errors()

    @property
    def parts(self) -> list[Path]:
        """The files of results, in the order of their making."""
        found = [path for path in self.folder.iterdir() if PART.fullmatch(path.name)]
        return sorted(found, key=_number)

    def done(self, rows: Sequence[Row]) -> set[int]:
        """The places of the rows that are answered or known to be bad.

        Raises:
            QuickmergeError: a row that is done is another one in ``rows``, or a part is damaged.
        """
        found: set[int] = set()
        for index, mark in self._marks():
            if index >= len(rows) or rows[index].hash != mark:
                what = f"row {index} is another one" if index < len(rows) else f"row {index} is missing"
                raise QuickmergeError(
                    f"--input must be as it was when {self.folder} was begun, or have grown at its end, but {what}: "
                    "name another --out"
                )
            found.add(index)
        return found

    def add(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Write one more part, whole or not at all; nothing for no results.

        Raises:
            QuickmergeError: the disk is full or not writable.
        """
        if not results:
            return
        ordered = [{name: each[name] for name in FIELDS} for each in sorted(results, key=lambda each: each["index"])]
        data = _as_parquet(ordered) if self.format == "parquet" else _as_lines(ordered)
        write_bytes(self.folder / f"results-{self._next:06d}.{self.format}", data)
        self._next += 1

    def add_errors(self, errors: Sequence[Mapping[str, Any]]) -> None:
        """Write ``errors.jsonl`` anew with these too: rows with ``index``, ``id``, ``hash`` and ``error``."""
        if errors:
            self.errors += [dict(each) for each in errors]
            self.errors.sort(key=lambda each: each["index"])
            write_bytes(self.folder / ERRORS, _as_lines(self.errors))

    def totals(self) -> dict[str, float]:
        """Sums over all results: rows, and tokens read, kept and written."""
        names = ("tokens_read", "tokens_kept", "tokens_written")
        sums = dict.fromkeys(("rows", *names), 0.0)
        for path in self.parts:
            columns = _columns(path, names)
            sums["rows"] += len(columns[names[0]])
            for name in names:
                sums[name] += sum(columns[name])
        return sums

    def _marks(self) -> Iterator[tuple[int, str]]:
        for path in self.parts:
            columns = _columns(path, ("index", "hash"))
            yield from zip(columns["index"], columns["hash"], strict=True)
        for each in self.errors:
            yield each["index"], each["hash"]

    def _read_errors(self) -> list[dict[str, Any]]:
        path = self.folder / ERRORS
        if not path.exists():
            return []
        with door(f"{path} is damaged", remedy="delete it, and its rows are tried again"):
            found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            return [{**each, "index": int(each["index"]), "hash": str(each["hash"])} for each in found]


def check_folder(folder: Path) -> None:
    """Raise QuickmergeError unless a folder is missing, empty, or that of a batch job; before anything long begins."""
    with told(folder):
        if folder.exists() and not folder.is_dir():
            raise QuickmergeError(f"--out {folder} must be a folder, got a file")
        if not folder.exists() or (folder / MANIFEST).exists():
            return
        others = sorted(each.name for each in folder.iterdir() if each.name != LOCK and not _unfinished(each.name))
    if others:
        raise QuickmergeError(
            f"--out {folder} must be empty or the folder of a batch job, but it holds {others[0]!r} and no {MANIFEST}"
        )


def _unfinished(name: str) -> bool:
    """Whether a file is what a killed write has left, which the next one sweeps away."""
    return name.startswith(".") and "quickmerge" in name


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    with door(f"{path} is damaged", remedy="name another --out"):
        found: dict[str, Any] = json.loads(path.read_bytes())
        version = found["version"]
        found["settings"].items()
    if version != VERSION:
        raise QuickmergeError(
            f"{path} must be of version {VERSION}, got {version!r}: it was written by another quickmerge"
        )
    return found


def _check_same(folder: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name in sorted(then.keys() | now.keys()):
        if then.get(name) != now.get(name):
            old, new = (_shown(each.get(name)) for each in (then, now))
            raise QuickmergeError(
                f"{name} was {old} when {folder} was begun and is {new} now: make them the same, or name another --out"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _number(path: Path) -> int:
    found = PART.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _as_lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def _as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    arrow, parquet = _arrow()
    schema = arrow.schema([(name, getattr(arrow, kind)()) for name, kind in FIELDS.items()])
    held = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(list(rows), schema=schema), held)
    return held.getvalue()


def _columns(path: Path, names: Sequence[str]) -> dict[str, list[Any]]:
    with door(f"{path} is damaged", remedy="delete it, and its rows are done again"):
        if path.suffix == ".parquet":
            found: dict[str, list[Any]] = _arrow()[1].read_table(path, columns=list(names)).to_pydict()
            return found
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {name: [row[name] for row in rows] for name in names}


def _arrow() -> tuple[Any, Any]:
    what = "results as parquet"
    return need("pyarrow", "ray", what), need("pyarrow.parquet", "ray", what)
