"""The benchmark of vision transformers in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.report.blocks import heading, paragraph, table
from quickmerge.report.loose import facts
from quickmerge.report.page import page, write_page

if TYPE_CHECKING:
    from rich.console import Console

_METHOD = (
    "Compute is the share of the multiplications of the model as it is, embedding and head left out. Fidelity is the "
    "cosine of features with those of the model as it is: of the class token and the mean patch together, and of each "
    "patch, where one that was dropped counts as 0.",
    "Speed-up is the time of the model as it is over the method's, which took turns; the method's own work is inside.",
)


def headers(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the columns are called; there is one for labels only where there are labels."""
    labels = ["correct"] if any("correct" in row for row in rows) else []
    return ["method", "compute", "tokens out", *labels, "pooled", "patches", "images/s", "speed-up"]


def cells(row: Mapping[str, Any], labelled: bool, short: bool = False) -> list[str]:
    """One line of the table; ``short`` gives half the width of an interval for its ends."""

    def share(key: str, digits: int) -> str:
        if short:
            return f"{row[key]:.{digits}f} ±{(row[f'{key}_high'] - row[f'{key}_low']) / 2:.{digits}f}"
        low, high = (f"{row[f'{key}_{end}']:.{digits}f}" for end in ("low", "high"))
        return f"{row[key]:.{digits}f} ({low} to {high})"

    labels = [share("correct", 3)] if labelled else []
    fast = f"{row['images_per_second']:.1f}" if "images_per_second" in row else "–"
    gain = f"{row['speedup']:.2f}x" if "speedup" in row else "–"
    out = f"{row['tokens_out']:.0f}"
    return [row["method"], f"{row['ratio']:.2f}", out, *labels, share("pooled", 4), share("patches", 3), fast, gain]


def vision_table(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the rows."""
    from rich.table import Table

    from quickmerge.terminal import plain

    names = headers(rows)
    printed = Table(*names, caption="± is half of the 95 % interval over images")
    for row in _ordered(rows):
        printed.add_row(*map(plain, cells(row, "correct" in names, short=True)))
    console.print(printed)


def write_vision_report(path: Path, rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
    """Write the rows and what was measured as a page."""
    names = headers(rows)
    body = [cells(row, "correct" in names) for row in _ordered(rows)]
    blocks = [
        heading("What survives, for what it costs"),
        table(names, body, align="l" + "r" * (len(names) - 1), caption="Cheapest last, most faithful first."),
        *(paragraph(words) for words in _METHOD),
        table(["", "this run"], facts(meta), align="ll"),
    ]
    write_page(path, page(f"{meta['model']}: fewer tokens on {meta['images']} images", blocks))


def _ordered(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The model as it is, then by what was asked for, most faithful first."""
    return sorted(rows, key=lambda row: (-(row["asked"] or row["ratio"]), -row["pooled"]))
