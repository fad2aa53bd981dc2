"""What a long measurement has done so far, line by line, so that a run that was broken off goes on where it was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Notes:
    """Records by key in a file of JSON lines, of which the first says what was measured with which settings.

    Args:
        path: the file. Notes of other settings are removed; a line that was broken off is cut off.
        settings: all that the records depend on.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.done = read_notes(path, settings)
        if not path.is_file():
            self._append(settings)

    def add(self, key: str, records: list[dict[str, Any]]) -> None:
        """Note what was measured."""
        self.done[key] = records
        self._append({"key": key, "records": records})

    def remove(self) -> None:
        """Remove the file, once the results are written."""
        self.path.unlink()

    def _append(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def read_notes(path: Path, settings: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What an earlier run with the same settings noted, by key; a line that was broken off is cut off the file.

    Notes of other settings are removed.
    """
    whole: list[str] = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
            try:
                json.loads(line)
            except ValueError:
                break
            if not line.endswith("\n"):
                break
            whole.append(line)
    if not whole or json.loads(whole[0]) != settings:
        path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return {}
    path.write_text("".join(whole), encoding="utf-8")
    return {entry["key"]: entry["records"] for entry in map(json.loads, whole[1:])}
