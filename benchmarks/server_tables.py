"""The table of a packaged model's server beside the plain model's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.bench.table import Column, Table, number, text

Row = dict[str, Any]


def server(rows: Sequence[Row]) -> Table:
    """What was lost or mixed, and what a client waited for."""
    columns = [
        Column("server", text("server")), Column("tokens read", number("read", ".0f")),
        Column("clients", number("clients")), Column("requests", number("requests")),
        Column("lost", number("lost")), Column("mixed", number("mixed")),
        Column("same text as alone", lambda r: f"{r['same']} of {r['requests']}"),
        Column("first token", number("first_seconds", ".2f", unit=" s")),
        Column("its p95", number("first_seconds_p95", ".2f", unit=" s")),
        Column("whole answer", number("seconds", ".2f", unit=" s")),
        Column("its p95", number("seconds_p95", ".2f", unit=" s")),
    ]  # fmt: skip
    return Table(columns, rows)


SERVER: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {"server": ("server", server, "rows")}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
