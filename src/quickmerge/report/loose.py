"""Read the JSON-like data of a report, and say plainly what is missing from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.report.cells import TokenCell
from quickmerge.report.numbers import number
from quickmerge.report.text import clean

_CELL_FIELDS = tuple(field.name for field in fields(TokenCell))


def part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under ``key``."""
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise QuickmergeError(f"The report data needs a mapping under {key!r}.")
    return value


def needed(data: Mapping[str, Any], key: str) -> float:
    """Return the number under ``key``, which the report cannot do without."""
    value = number(data, key)
    if value is None:
        raise QuickmergeError(f"The report data needs a number under {key!r}.")
    return value


def words(data: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """Return the text under ``key``."""
    value = data.get(key, default)
    if value is None:
        raise QuickmergeError(f"The report data needs a text under {key!r}.")
    return clean(value)


def cells_of(data: Mapping[str, Any]) -> list[TokenCell]:
    """Return the token cells under ``cells``, given as cells or as mappings of their fields."""
    cells = []
    for order, item in enumerate(data.get("cells") or ()):
        if isinstance(item, TokenCell):
            cells.append(item)
            continue
        absent = [name for name in _CELL_FIELDS if not isinstance(item, Mapping) or name not in item]
        if absent:
            raise QuickmergeError(f"Token cell {order} of the report data lacks {', '.join(absent)}.")
        cells.append(TokenCell(**{name: item[name] for name in _CELL_FIELDS}))
    return cells


def facts(data: object, prefix: str = "") -> list[tuple[str, str]]:
    """Return ``data`` as named lines: a mapping line by line, nested ones with a path, anything else as one line."""
    if isinstance(data, Mapping):
        lines: list[tuple[str, str]] = []
        for key, value in data.items():
            name = clean(key).replace("_", " ")
            lines += facts(value, f"{prefix} {name}".strip())
        return lines
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [(prefix, ", ".join(clean(item) for item in data))]
    return [(prefix, "–" if data is None else clean(data))]
