"""The tables of what a CPU core allows: precisions and drafters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from quickmerge.bench.table import Column, Table, number, text

Row = Mapping[str, Any]


def ratio(key: str) -> Callable[[Row], str]:
    """A median with its quartiles, which come as three numbers."""

    def cell(row: Row) -> str:
        middle, low, high = row[key]
        return f"{middle:.2f}x ({low:.2f} to {high:.2f})"

    return cell


def cpu_speed(rows: list[Row]) -> Table:
    """Whole texts, each way beside the plain model in its own precision and in float32."""
    columns = [
        Column("prompts", text("kind")),
        Column("precision", text("precision")),
        Column("drafter", text("drafter")),
        Column("of plain in that precision (quartiles)", ratio("of_plain")),
        Column("of plain in float32", ratio("of_float32")),
        Column("tokens a pass", number("tokens_per_pass", ".2f")),
        Column("texts as plain", lambda row: f"{row['same']} of {row['prompts']}"),
        Column("as float32", lambda row: f"{row['same_as_float32']} of {row['prompts']}"),
    ]
    return Table(columns, rows)


def cpu_passes(costs: Mapping[str, Mapping[str, float]]) -> Table:
    """What a pass over several tokens costs, one token's pass being 1."""
    counts = list(next(iter(costs.values())))

    def of(count: str) -> Column:
        return Column(count, lambda row: f"{row[count]:.2f}")

    rows = [{"precision": name, **own} for name, own in costs.items()]
    return Table([Column("tokens a pass", text("precision")), *map(of, counts)], rows)


CPU: dict[str, tuple[str, Callable[[Any], Table], str | None]] = {
    "cpu_speed": ("cpu_speed", cpu_speed, "rows"),
    "cpu_passes": ("cpu_speed", cpu_passes, "costs"),
}
"""By the name in the docs: the result file, what makes the table of it, and what it is made of."""
