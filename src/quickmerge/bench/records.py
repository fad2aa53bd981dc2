"""Measurements that long work writes down one by one, so that it can be stopped at any moment and taken up again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.files import told

__all__ = ["Records"]


class Records:
    """What was measured, by what tells one measurement from another, and the file that holds it.

    The file has a JSON object on each line and only ever grows. A line that a kill has cut off is removed when the file
    is opened again. Lines of other settings stay, and are of no account: several runs may share a file, one at a time.

    Args:
        path: the file, made if need be; None keeps everything in memory alone.
        settings: what all of these measurements have in common, of JSON's own types.
        key: the entries of a record that tell it from the others.

    Raises:
        QuickmergeError: the file can't be read or written, or holds something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any], key: Sequence[str]) -> None:
        self._path, self._key = path, tuple(key)
        # As JSON gives them back, or tuples would differ from lists.
        self._settings = json.loads(json.dumps(dict(settings)))
        self._found: dict[tuple[Any, ...], dict[str, Any]] = {}
        if path is not None:
            with told(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                self._open(path)

    def get(self, *key: Any) -> dict[str, Any] | None:
        """The record of these entries, in the order of the keys; None if there is none."""
        return self._found.get(key)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write down a record of JSON's own types; it is in the file when this returns.

        Raises:
            QuickmergeError: the disk is full or not writable.
        """
        made = dict(record)
        if self._path is not None:
            line = json.dumps({"settings": self._settings, **made}, ensure_ascii=False, allow_nan=False) + "\n"
            with told(self._path), self._path.open("ab") as file:
                file.write(line.encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        self._found[tuple(made[name] for name in self._key)] = made

    def _open(self, path: Path) -> None:
        with path.open("a+b") as file:
            file.seek(0)
            data = file.read()
            whole = data.rfind(b"\n") + 1
            self._take(data[:whole], path)
            if whole < len(data):  # a kill came in between
                file.truncate(whole)

    def _take(self, data: bytes, path: Path) -> None:
        for number, line in enumerate(data.splitlines(), 1):
            try:
                held = json.loads(line)
                known = held.pop("settings") == self._settings
                entry = tuple(held[name] for name in self._key) if known else ()
                hash(entry)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise QuickmergeError(f"{path} must hold records, got something else on line {number}") from None
            if known:
                self._found[entry] = held
