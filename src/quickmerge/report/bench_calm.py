"""The benchmark of CALMs in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.report.blocks import heading, paragraph, table
from quickmerge.report.loose import facts
from quickmerge.report.page import page, write_page

if TYPE_CHECKING:
    from rich.console import Console

Rows = Sequence[Mapping[str, Any]]

_METHOD = (
    "BrierLM is 100 times the geometric mean of the Brier scores of the next one to four tokens, each clamped at zero "
    "by itself, at the same places of the same texts for every model. CALMs are measured by draws, ordinary models by "
    "their probabilities; both are unbiased. Intervals are of 95 %, over documents or windows drawn with replacement, "
    "and differences are paired.",
    "Operations for a token are two for each weight of a matrix, with attention to half a window, the head, and the "
    "autoencoder's decoder with its logits. Speed is tokens a second of whole calls, models taking turns: medians and "
    "quartiles.",
)


def calm_table(rows: Rows, speeds: Rows, draws: Rows, console: Console) -> None:
    """Print BrierLM, cost and speed of every model, and what temperatures do."""
    _print(console, *brier_cells(rows, speeds, short=True))
    if draws:
        _print(console, *draw_cells(draws))
    first = rows[0]
    console.print(
        f"95 % intervals over {first['groups']} {first['unit']}, {first['positions']} places; speed: median of rounds"
    )


def write_calm_report(path: Path, rows: Rows, speeds: Rows, draws: Rows, meta: Mapping[str, Any]) -> None:
    """Write the rows and what was measured as a page."""
    blocks = [heading("Quality beside cost"), _table(*brier_cells(rows, speeds))]
    blocks += [paragraph(words) for words in _METHOD]
    blocks += [heading("Brier scores of the next one to four tokens"), _table(*term_cells(rows))]
    if draws:
        blocks += [heading("Sampling at a temperature"), _table(*draw_cells(draws))]
    blocks.append(table(["", "this run"], facts(meta), align="ll"))
    write_page(path, page("Several tokens as one vector: quality and cost", blocks))


def brier_cells(rows: Rows, speeds: Rows, *, short: bool = False) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: BrierLM, the difference, parameters, operations and tokens a second by batch."""
    batches = list(dict.fromkeys(s["batch"] for s in speeds))
    headers = ["model", "K", "BrierLM", "difference", "parameters", "operations/token"]
    headers += [f"tokens/s, batch {batch}" for batch in batches]
    pace = {(s["method"], s["batch"]): s for s in speeds}
    body = []
    for r in rows:
        gap = "" if "gap" not in r else f"{r['gap']:+.2f} ({r['gap_low']:+.2f} to {r['gap_high']:+.2f})"
        cells = [
            str(r["method"]),
            "" if r["kind"] == "tokens" else str(r["patch"]),
            f"{r['brier_lm']:.2f} ({r['brier_lm_low']:.2f} to {r['brier_lm_high']:.2f})",
            gap,
            f"{r['parameters'] / 1e6:.2f} M",
            f"{r['flops'] / 1e6:.2f} M ({r['flops_ratio']:.2f}x)",
        ]
        for batch in batches:
            s = pace[r["method"], batch]
            spread = "" if short else f" ({s['per_second_low']:.0f} to {s['per_second_high']:.0f})"
            cells.append(f"{s['per_second']:.0f}{spread}, {s['speedup']:.2f}x")
        body.append(cells)
    return headers, body


def term_cells(rows: Rows) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: the four scores with their intervals."""
    body = [
        [
            str(r["method"]),
            *(
                f"{term:.4f} ({low:.4f} to {high:.4f})"
                for term, low, high in zip(r["terms"], r["terms_low"], r["terms_high"], strict=True)
            ),
        ]
        for r in rows
    ]
    return ["model", *(f"Brier-{n}" for n in range(1, 5))], body


def draw_cells(draws: Rows) -> tuple[list[str], list[list[str]]]:
    """Headers and cells: what a temperature does, and the draws that it takes beside those of the formula."""
    headers = ["model", "temperature", "method", "right", "same twice", "draws", "by the formula", "gave up",
               "operations/token"]  # fmt: skip
    body = [
        [
            str(r["method"]),
            f"{r['temperature']:.3g}",
            str(r["temperature_method"]),
            f"{100 * r['right']:.1f} %",
            f"{100 * r['same']:.1f} %",
            f"{r['draws']:.1f}",
            f"{r['expected']:.1f}",
            f"{100 * r['gave_up']:.0f} %",
            f"{r['flops'] / 1e6:.1f} M",
        ]
        for r in draws
    ]
    return headers, body


def _table(headers: list[str], body: list[list[str]]) -> str:
    return table(headers, body, align="l" + "r" * (len(headers) - 1))


def _print(console: Console, headers: list[str], body: list[list[str]]) -> None:
    from rich.table import Table

    from quickmerge.terminal import plain

    printed = Table()
    for at, name in enumerate(headers):
        printed.add_column(plain(name), justify="left" if at == 0 else "right", overflow="fold")
    for cells in body:
        printed.add_row(*map(plain, cells))
    console.print(printed)
