"""Tables of drafters: each takes the rows of a list in results/gumiho.json."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.bench.table import Column, Table, interval, number, text, unless
from quickmerge.speculative.report import DRAFTING, NODES, PER_SECOND, SAME, TEMPERATURE, is_plain, ordered

Row = dict[str, Any]

METHOD = Column("method", lambda r: f"**{r['method']}**" if r["method"] == "gumiho" else str(r["method"]))
PER_PASS = Column("tokens per forward pass (95 %)", lambda r: (
    number("tokens_per_pass", ".2f") if is_plain(r) else interval("tokens_per_pass", ".2f"))(r))  # fmt: skip
SPEED = Column("speed (quartiles)", lambda r: (
    number("speedup", ".2f", unit="x") if is_plain(r) else interval("speedup", ".2f", unit="x"))(r))  # fmt: skip
INSIDE = (
    Column("nodes read", NODES.cell), DRAFTING, Column("target", number("target_share", ".0f", scale=100, unit=" %")),
)  # fmt: skip
"""Nodes a pass reads, and the shares of the time that the drafter and passes behind the prompt take."""


def drafters(rows: Sequence[Row]) -> Table:
    """Tokens per forward pass and speed of every way, at each temperature."""
    per_second = Column("tokens a second", PER_SECOND.cell)
    return Table([TEMPERATURE, METHOD, PER_PASS, SPEED, per_second, *INSIDE, SAME], ordered(rows))


def paired(rows: Sequence[Row]) -> Table:
    """The main drafter against every other way, prompt by prompt."""
    columns = [
        TEMPERATURE, Column("", lambda r: f"{r['method']} against {r['other']}"),
        Column("tokens per forward pass more (95 %)", interval("gain", "+.2f")),
        Column("speed (quartiles)", interval("speedup", ".2f", unit="x")),
        Column("prompts on which it is faster", number("faster", ".0f", scale=100, unit=" %")),
    ]  # fmt: skip
    return Table(columns, rows)


def depths(rows: Sequence[Row]) -> Table:
    """The share of passes that accepted so many drafted tokens or more."""
    drafted = [r for r in ordered(rows) if "reached" in r]
    deep = max((len(r["reached"]) for r in drafted), default=0)

    def at(depth: int) -> Column:
        there = unless(lambda r: depth >= len(r["reached"]), lambda r: f"{100 * r['reached'][depth]:.1f} %")
        return Column(f"{depth + 1} or more" if depth + 1 < deep else f"{deep}", there)

    return Table([TEMPERATURE, METHOD, *map(at, range(deep))], drafted)


def kinds(rows: Sequence[Row]) -> Table:
    """Tokens per forward pass by kind of prompt, greedy."""
    greedy = [r for r in ordered(rows) if r["temperature"] == 0 and not is_plain(r)]

    def of(kind: str) -> Column:
        return Column(kind, lambda r: f"{r['kinds'][kind]['tokens_per_pass']:.2f}")

    return Table([METHOD, *map(of, greedy[0]["kinds"] if greedy else ())], greedy)


def trees(rows: Sequence[Row]) -> Table:
    """Trees of fixed sizes, ``auto`` and Full Tree Attention."""
    tree = Column("tree", lambda r: r["method"] + ("" if r.get("lossless", True) else " (lossy)"))
    return Table([tree, PER_PASS, SPEED, *INSIDE, SAME], [r for r in rows if not is_plain(r)])


def costs(rows: Sequence[Row]) -> Table:
    """What a pass costs by nodes."""
    lines = [
        {"": "ms", **{f"{r['nodes']}": f"{1e3 * r['seconds']:.0f}" for r in rows}},
        {"": "c(T) / c(1)", **{f"{r['nodes']}": f"{r['ratio']:.2f}" for r in rows}},
    ]
    return Table([Column(name or "nodes", text(name)) for name in lines[0]], lines)


GUMIHO: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "gumiho": ("gumiho", drafters, "rows"),
    "gumiho_paired": ("gumiho", paired, "paired"),
    "gumiho_depths": ("gumiho", depths, "rows"),
    "gumiho_kinds": ("gumiho", kinds, "rows"),
    "gumiho_trees": ("gumiho", trees, "trees"),
    "gumiho_costs": ("gumiho", costs, "costs"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
