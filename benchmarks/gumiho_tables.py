"""Tables of drafters: each takes the rows of a list in results/gumiho.json and gives headers and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def drafters(rows: Sequence[Row]) -> Table:
    """Tokens a pass and speed of every way, at each temperature."""
    body = [
        [f"{r['temperature']:g}", _name(r), _per_pass(r), _speed(r), f"{r['per_second']:.1f}", *_inside(r), _same(r)]
        for r in _ordered(rows)
    ]
    headers = ["temperature", "method", "tokens a pass (95 %)", "speed (quartiles)", "tokens a second", "nodes read",
               "drafting", "target", "same text"]  # fmt: skip
    return headers, body


def paired(rows: Sequence[Row]) -> Table:
    """The main drafter against every other way, prompt by prompt."""
    body = [
        [
            f"{r['temperature']:g}",
            f"{r['method']} against {r['other']}",
            f"{r['gain']:+.2f} ({r['gain_low']:+.2f} to {r['gain_high']:+.2f})",
            _speed(r),
            f"{100 * r['faster']:.0f} %",
        ]
        for r in rows
    ]
    return ["temperature", "", "tokens a pass more (95 %)", "speed (quartiles)", "prompts on which it is faster"], body


def depths(rows: Sequence[Row]) -> Table:
    """The share of passes that accepted so many drafted tokens or more."""
    drafted = [r for r in _ordered(rows) if "reached" in r]
    deep = max((len(r["reached"]) for r in drafted), default=0)
    body = [
        [f"{r['temperature']:g}", _name(r), *(f"{100 * share:.1f} %" for share in r["reached"])]
        + [""] * (deep - len(r["reached"]))
        for r in drafted
    ]
    return ["temperature", "method", *(f"{i + 1} or more" if i + 1 < deep else f"{deep}" for i in range(deep))], body


def kinds(rows: Sequence[Row]) -> Table:
    """Tokens a pass by kind of prompt, greedy."""
    greedy = [r for r in _ordered(rows) if r["temperature"] == 0 and r["method"] != "plain"]
    names = list(greedy[0]["kinds"]) if greedy else []
    return ["method", *names], [[_name(r), *(f"{r['kinds'][k]['per_pass']:.2f}" for k in names)] for r in greedy]


def trees(rows: Sequence[Row]) -> Table:
    """Trees of fixed sizes, ``auto`` and Full Tree Attention."""
    body = [
        [
            r["method"] + ("" if r.get("lossless", True) else " (lossy)"),
            _per_pass(r),
            _speed(r),
            *_inside(r),
            _same(r),
        ]
        for r in rows
        if r["method"] != "plain"
    ]
    headers = ["tree", "tokens a pass (95 %)", "speed (quartiles)", "nodes read", "drafting", "target", "same text"]
    return headers, body


def costs(rows: Sequence[Row]) -> Table:
    """What a pass costs by nodes."""
    headers = ["nodes", *(f"{r['nodes']}" for r in rows)]
    return headers, [["ms", *(f"{1e3 * r['seconds']:.0f}" for r in rows)],
                     ["c(T) / c(1)", *(f"{r['ratio']:.2f}" for r in rows)]]  # fmt: skip


GUMIHO: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "gumiho": ("gumiho", drafters, "rows"),
    "gumiho_paired": ("gumiho", paired, "paired"),
    "gumiho_depths": ("gumiho", depths, "rows"),
    "gumiho_kinds": ("gumiho", kinds, "rows"),
    "gumiho_trees": ("gumiho", trees, "trees"),
    "gumiho_costs": ("gumiho", costs, "costs"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""


def _ordered(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda r: (r["temperature"], r["method"] != "plain", r["speedup"]))


def _name(r: Row) -> str:
    return f"**{r['method']}**" if r["method"] == "gumiho" else str(r["method"])


def _per_pass(r: Row) -> str:
    if r["method"] == "plain":
        return f"{r['per_pass']:.2f}"
    return f"{r['per_pass']:.2f} ({r['per_pass_low']:.2f} to {r['per_pass_high']:.2f})"


def _speed(r: Row) -> str:
    if r["method"] == "plain":
        return f"{r['speedup']:.2f}x"
    return f"{r['speedup']:.2f}x ({r['speedup_low']:.2f} to {r['speedup_high']:.2f})"


def _inside(r: Row) -> list[str]:
    """Nodes a pass reads, and the shares of the time that the drafter and passes behind the prompt take."""
    if "nodes" not in r:
        return ["", "", ""]
    return [f"{r['nodes']:.1f}", f"{100 * r['draft_share']:.0f} %", f"{100 * r['target_share']:.0f} %"]


def _same(r: Row) -> str:
    return "" if r["same"] is None or r["method"] == "plain" else f"{r['same']} of {r['prompts']}"
