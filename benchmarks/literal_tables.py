"""Tables of literals that stay alone: what it keeps, and what it costs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quickmerge.bench.table import Column, Table, interval, number, text

Row = dict[str, Any]
FILE = Path(__file__).parent / "results" / "literals.json"
_PERCENT: dict[str, Any] = {"scale": 100, "unit": " %"}
COLUMNS = (
    Column("", text("way"), "l"),
    Column("recovery (95 % interval)", interval("recovery", ".3f")),
    Column("literals kept (95 % interval)", interval("literals_kept", ".0f", **_PERCENT)),
    Column("plain model repeats", lambda r: f"{r['literals_known']} of {r['literals_asked']}"),
    Column("FLOPs", number("flops_ratio", ".3f")),
    Column("cache", number("cache_ratio", ".3f")),
    Column("prefill", number("prefill_seconds", ".2f", unit=" s")),
    Column("of the plain model's", number("prefill_ratio", ".2f")),
)


def _rows() -> list[Row] | None:
    if not FILE.is_file():
        return None
    rows: list[Row] = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    return rows


def literals() -> Table | None:
    """Every way over all documents."""
    rows = _rows()
    return None if rows is None else Table(COLUMNS, [row for row in rows if row["kind"] is None])


def by_kind() -> Table | None:
    """The share of tokens that are of literals, and what is kept, by kind of document."""
    rows = _rows()
    if rows is None:
        return None
    columns = (
        Column("documents", lambda r: f"{r['kind']}, {r['documents']}", "l"), Column("", text("way"), "l"),
        Column("tokens of literals", number("literal_share", ".0f", **_PERCENT)),
        Column("recovery", number("recovery", ".3f")),
        Column("literals kept", number("literals_kept", ".0f", **_PERCENT)),
        Column("FLOPs", number("flops_ratio", ".3f")),
    )  # fmt: skip
    some = [row for row in rows if row["kind"] is not None and row["way"] != "keep 0.6"]
    return Table(columns, some, group=lambda row: row["kind"])


LITERALS: dict[str, Callable[[], Table | None]] = {"literals": literals, "literals_kinds": by_kind}
"""By the name in the docs."""
