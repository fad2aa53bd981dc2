"""The table of how often a host waits for its device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quickmerge.bench.table import Column, Table, number, text


def waits(rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """For each case what plain generate waits for, and what is waited for beyond that."""
    columns = [
        Column("what", text("what")),
        Column("plain", number("plain", ".3g")),
        Column("with it", number("waits", ".3g")),
        Column("more", number("more", ".3g")),
        Column("operations", lambda row: f"{row['operations']:.0f}" if row.get("operations") else ""),
    ]
    return Table(columns, [{"what": what, **row} for what, row in rows.items()])


WAITS: dict[str, tuple[str, Callable[[Any], Table], str]] = {"waits": ("waits", waits, "rows")}
"""By the name in the docs: the result file, what makes the table of it, and what it is made of."""
