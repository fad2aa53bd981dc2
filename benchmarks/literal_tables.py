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


LITERALS: dict[str, Callable[[], Table | None]] = {"literals": literals}
"""By the name in the docs."""
