"""The tables of how costs grow with a prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quickmerge.bench.table import Column, Table, interval, number, text

MIB = 2**-20


def curves(data: Mapping[str, Any], shape: str | None = None, batched: bool | None = None) -> Table:
    """For each length, batch and way: seconds, the ratio to the plain model beside its limit, and memory."""
    rows = [
        row for row in data["rows"]
        if shape in (None, row["shape"]) and batched in (None, row["batch"] > 1)
    ]  # fmt: skip
    peak = all("peak_bytes" in row for row in rows)
    columns = [
        Column("shape", text("shape")) if shape is None else None,
        Column("tokens", number("tokens", ",")),
        Column("batch", number("batch")) if batched is not False else None,
        Column("way", text("way")),
        Column("prefill", number("prefill_seconds", ".2f", unit=" s")),
        Column("speed-up (quartiles)", interval("prefill_speedup", ".2f", unit="x")),
        Column("FLOPs allow", number("prefill_allowed", ".2f", unit="x")),
        Column("token", number("step_seconds", ".1f", scale=1e3, unit=" ms")),
        Column("speed-up (quartiles)", interval("step_speedup", ".2f", unit="x")),
        Column("bytes allow", number("step_allowed", ".2f", unit="x")),
        Column("cache", number("cache_bytes", ".1f", scale=MIB, unit=" MiB")),
        Column("peak", number("peak_bytes", ".0f", scale=MIB, unit=" MiB")) if peak else None,
    ]
    return Table([column for column in columns if column], rows)


def exponents(rows: list[Mapping[str, Any]]) -> Table:
    """With what power of the length seconds grow."""
    columns = [
        Column("shape", text("shape")),
        Column("way", text("way")),
        Column("prefill", number("prefill_all", ".2f")),
        Column("at the long end", number("prefill_end", ".2f")),
        Column("token", number("step_all", ".2f")),
        Column("at the long end", number("step_end", ".2f")),
    ]
    return Table(columns, rows)


CURVES: dict[str, tuple[str, Callable[[Any], Table], str | None]] = {
    "curves_smollm2": ("curves", lambda data: curves(data, "smollm2", False), None),
    "curves_llama": ("curves", lambda data: curves(data, "llama-8b", False), None),
    "curves_batches": ("curves", lambda data: curves(data, None, True), None),
    "curves_exponents": ("curves", exponents, "exponents"),
}
"""By the name in the docs: the result file, what makes the table of it, and what it is made of (None: all of it)."""
