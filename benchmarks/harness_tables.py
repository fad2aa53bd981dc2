"""The table of lm-eval's tasks through our door: scores beside what reading a prompt took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quickmerge.bench.table import Column, Table, number, text

Row = dict[str, Any]
FILE = Path(__file__).parent / "results" / "harness.json"
PLAIN = "plain"


def harness() -> Table | None:
    """By task and length, every way: the score, and beside it tokens, FLOPs, prefill seconds and the cache."""
    if not FILE.is_file():
        return None
    rows: list[Row] = json.loads(FILE.read_text(encoding="utf-8"))["rows"]
    plain = {(r["task"], r["tokens"]): r["prefill_seconds"] for r in rows if r["way"] == PLAIN}

    def score(r: Row) -> str:
        found = f"{r['score']:.2f}"
        return found if r["low"] is None else f"{found} ({r['low']:.2f} to {r['high']:.2f})"

    def prefill(r: Row) -> str:
        share = r["prefill_seconds"] / plain[r["task"], r["tokens"]]
        return f"{r['prefill_seconds']:.1f} s ({share:.2f})"

    columns = [
        Column("task", text("task"), "l"), Column("length", number("tokens", ",")), Column("way", text("way"), "l"),
        Column("score (95 % interval)", score), Column("samples", number("samples", ",")),
        Column("tokens kept", number("tokens_kept", ",.0f")), Column("FLOPs", number("flops_ratio", ".2f")),
        Column("prefill (of plain)", prefill), Column("cache", number("cache_bytes", ".1f", scale=2**-20, unit=" MiB")),
    ]  # fmt: skip
    order = list(dict.fromkeys(r["task"] for r in rows))
    ways = list(dict.fromkeys(sorted((r["way"] for r in rows), key=lambda way: (way != PLAIN, way))))
    rows = sorted(rows, key=lambda r: (order.index(r["task"]), r["tokens"], ways.index(r["way"])))
    return Table(columns, rows)


HARNESS: dict[str, Callable[[], Table | None]] = {"harness": harness}
