"""The rows of a benchmark: which of them belong together, and in what order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from quickmerge.errors import QuickmergeError
from quickmerge.report.numbers import number
from quickmerge.report.text import clean

Row: TypeAlias = Mapping[str, object]

_FULL = ("full", "none", "identity")
_NOT_AVERAGED = ("recovery_low", "recovery_high")


def name_of(row: Row) -> str:
    """Return the reducer of ``row``."""
    if row.get("reducer") is None:
        raise QuickmergeError("Every benchmark row needs the name of its reducer under 'reducer'.")
    return clean(row["reducer"])


def is_ours(name: str) -> bool:
    """Return whether ``name`` is quickmerge or one of its variants."""
    return name.lower().startswith("quickmerge")


def is_full(row: Row) -> bool:
    """Return whether ``row`` is the unreduced run."""
    return name_of(row).lower() in _FULL


def has_kind(row: Row) -> bool:
    """Return whether ``row`` is about one kind of document only."""
    return row.get("kind") is not None


def overall(rows: Sequence[Row]) -> list[Row]:
    """Return the rows over all documents.

    Where there are only rows by kind, they are averaged for each reducer and keep value; their intervals cannot
    be averaged and are left out.
    """
    whole = [row for row in rows if not has_kind(row)]
    if whole:
        return whole
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((name_of(row), number(row, "keep")), []).append(row)
    return [_mean(group) for group in groups.values()]


def by_reducer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each reducer from its smallest keep value up, ours last (drawn on top)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not is_full(row):
            groups.setdefault(name_of(row), []).append(row)
    ordered = sorted(groups, key=lambda name: (is_ours(name), name))
    return {name: sorted(groups[name], key=lambda row: number(row, "keep") or 0.0) for name in ordered}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Return rows as a reader compares them: the unreduced run, then by keep value, best recovery first."""

    def key(row: Row) -> tuple[bool, float, bool, float, str]:
        recovery = number(row, "recovery")
        keep = number(row, "keep")
        return (not is_full(row), -(keep or 0.0), recovery is None, -(recovery or 0.0), name_of(row))

    return sorted(rows, key=key)


def _mean(group: Sequence[Row]) -> Row:
    result: dict[str, object] = {"reducer": group[0]["reducer"]}
    for name in group[0]:
        if name not in ("reducer", "kind", *_NOT_AVERAGED):
            values = [value for row in group if (value := number(row, name)) is not None]
            result[name] = sum(values) / len(values) if values else None
    return result
