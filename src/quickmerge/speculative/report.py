"""The benchmark of drafters in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.viz.page import facts, heading, page, paragraph, table, write_page

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[Mapping[str, Any]]

_HEADERS = ["temperature", "method", "tokens a pass", "speed", "tokens/s", "nodes", "drafting", "same text"]
_METHOD = (
    "Tokens a pass are new tokens over passes of the model. The prompt's pass and the token that it gives are left out "
    "on both sides; the token that the model adds to the accepted ones is counted. So plain decoding has exactly 1. "
    "± is half of the 95 % interval over prompts drawn with replacement.",
    "Speed is the time of plain decoding for each token over the method's, whole calls with everything inside: the "
    "median over prompts, and quartiles. Methods took turns, in another order for each prompt. Nodes are what a pass "
    "reads on average, and drafting is the share of the time that the drafter takes.",
    "Same text counts the prompts whose greedy text is that of plain decoding, token for token.",
)


def drafters_table(rows: Rows, console: Console) -> None:
    """Print the rows, a table for each temperature, the fastest last."""
    from rich.table import Table

    from quickmerge.terminal import plain

    for temperature in sorted({row["temperature"] for row in rows}):
        printed = Table(title="greedy" if temperature == 0 else f"temperature {temperature:g}", title_justify="left")
        for name in _HEADERS[1:]:
            # Where there is no room, the names of methods go over several lines, and no number does.
            method = name == "method"
            printed.add_column(
                "\n".join(name.split()), justify="left" if method else "right", no_wrap=not method,
                overflow="fold" if method else "ellipsis",
            )  # fmt: skip
        for row in ordered(row for row in rows if row["temperature"] == temperature):
            printed.add_row(*map(plain, _cells(row, quartiles=False)))
        console.print(printed)
    console.print(
        "tokens a pass: the model's own token counted, ± half of the 95 % interval over prompts; speed: median"
    )


def write_drafters_report(path: Path, rows: Rows, meta: Mapping[str, Any]) -> None:
    """Write the rows and what was measured as a page."""
    body = ordered(rows)
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    asked = [
        [f"{row['temperature']:g}", row["method"], *(f"{row['kinds'][kind]['per_pass']:.2f}" for kind in kinds)]
        for row in body
    ]
    depth = max(len(row.get("reached", ())) for row in rows)
    reached = [
        [
            f"{row['temperature']:g}",
            row["method"],
            *_padded([f"{100 * share:.0f} %" for share in row["reached"]], depth),
        ]
        for row in body
        if "reached" in row
    ]
    places = ["temperature", "method", *(f"{i + 1}" for i in range(depth))]
    blocks = [
        heading("Tokens a pass, and speed"),
        table(_HEADERS, [_cells(row) for row in body], align="rl" + "r" * 6),
        *(paragraph(words) for words in _METHOD),
        heading("Passes that accepted so many drafted tokens or more"),
        table(places, reached, align="rl" + "r" * depth),
        heading("Tokens a pass, by kind of prompt"),
        table(["temperature", "method", *kinds], asked, align="rl" + "r" * len(kinds)),
        table(["", "this run"], facts(meta), align="ll"),
    ]
    write_page(path, page(f"{meta['model']}: several tokens a step on {meta['prompts']} prompts", blocks))


def ordered(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By temperature, plain decoding first, then the slowest to the fastest."""
    return sorted(rows, key=lambda row: (row["temperature"], row["method"] != "plain", row["speedup"]))


def _cells(row: Mapping[str, Any], *, quartiles: bool = True) -> list[str]:
    per_pass, speed, same = f"{row['per_pass']:.2f}", f"{row['speedup']:.2f}x", ""
    if row["method"] != "plain":
        per_pass += f" ±{(row['per_pass_high'] - row['per_pass_low']) / 2:.2f}"
        speed += f" ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})" if quartiles else ""
        same = "" if row["same"] is None else f"{row['same']} of {row['prompts']}"
    drafted = ["", ""] if "nodes" not in row else [f"{row['nodes']:.1f}", f"{100 * row['draft_share']:.0f} %"]
    cells = [row["method"], per_pass, speed, f"{row['per_second']:.1f}", *drafted, same]
    return [f"{row['temperature']:g}", *cells] if quartiles else cells


def _padded(cells: list[str], width: int) -> list[str]:
    return cells + [""] * (width - len(cells))
