"""The report of a benchmark: every reducer at every keep value, on the same documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError
from quickmerge.report.bench_rows import HEADERS, SPARE, by_kind, cells
from quickmerge.report.blocks import figure, heading, lead, paragraph, table
from quickmerge.report.loose import facts
from quickmerge.report.numbers import number
from quickmerge.report.page import page
from quickmerge.report.pareto import pareto_svg
from quickmerge.report.pareto_lines import Cost
from quickmerge.report.rows import Row, has_kind, is_full, is_ours, name_of, overall, ranked
from quickmerge.report.text import clean
from quickmerge.report.verdict import bench_verdict

if TYPE_CHECKING:
    from rich.console import Console

_FEW = 4  # documents that are named one by one
_WIDE = 116  # columns that the whole table takes in a terminal
_METHOD = (
    "Every reducer read the same documents with the same model. NLL is how surprised the model is, on average, by "
    "each token of the text that really follows a document: lower is better.",
    "Recovery is the share of the improvement from reading the document that is left after the reduction: 100% is as "
    "good as the full document, 0% no better than never having read it. Below 0% the reduced document misleads.",
    "Compute and cache are shares of what the full prompt takes. Prefill is the time to read the prompt, by the clock "
    "on the machine named here, with the reducer's own time in it.",
)
_FIGURES: tuple[tuple[Cost, str], ...] = (
    (
        "flops_ratio",
        "Up and to the left is better. The compute follows from the model and does not depend on the machine.",
    ),
    ("prefill_seconds", "The same against the clock: here a reducer also pays for its own work."),
)


def bench_report(rows: Sequence[Row], meta: Mapping[str, Any]) -> str:
    """Return the whole report of a benchmark as one HTML page.

    Args:
        rows: One mapping for each reducer and keep value; rows with a ``kind`` break the same down by kind.
        meta: What to tell about the run. ``title``, ``subtitle``, ``interval`` (what the intervals are, such as "95%
            bootstrap over documents") and ``method`` (more sentences) have a place of their own; everything else,
            such as ``model``, ``hardware``, ``documents`` and ``versions``, is listed as it comes.

    Raises:
        QuickmergeError: there are no rows, or none that can be drawn.
    """
    if not rows:
        raise QuickmergeError("A benchmark report needs at least one row.")
    whole = ranked(overall(rows))
    interval = clean(meta.get("interval") or "uncertainty intervals")
    blocks = [lead(bench_verdict(whole)), heading("What survives, for what it costs")]
    for cost, words in _FIGURES:
        if any(number(row, cost) is not None and number(row, "recovery") is not None for row in whole):
            bars = (
                f" Vertical bars are {interval}."
                if any(number(row, "recovery_low") is not None for row in whole)
                else ""
            )
            blocks.append(figure(pareto_svg(whole, x=cost), words + bars))
    strong = [order for order, row in enumerate(whole) if is_ours(name_of(row))]
    averaged = " Rows are means over the kinds of document." if all(has_kind(row) for row in rows) else ""
    blocks += [
        heading("Every result"),
        table(
            HEADERS,
            [cells(row) for row in whole],
            align="lrrrrrrrrrr",
            strong=strong,
            caption=f"By the share of tokens kept, best recovery first.{averaged}",
            ruled=_groups(whole),
        ),
    ]
    kinds, lines, firsts = by_kind(rows)
    if kinds:
        ours = [order for order, row in enumerate(firsts) if is_ours(name_of(row))]
        blocks += [
            heading("Recovery by kind of document"),
            table(["reducer", "keep", *kinds], lines, strong=ours, ruled=_groups(firsts)),
        ]
    blocks += [heading("How this was measured"), *(paragraph(text) for text in (*_METHOD, *_more(meta)))]
    told = {key: value for key, value in meta.items() if key not in ("title", "subtitle", "interval", "method")}
    if told:
        blocks.append(table(["", "this run"], facts(told), align="ll"))
    title = clean(meta.get("title") or "What each reducer keeps, and what it costs")
    subtitle = meta.get("subtitle") or " · ".join(
        filter(None, (str(meta.get("model") or ""), _names(meta.get("documents"))))
    )
    return page(title, blocks, subtitle=clean(subtitle))


def _groups(rows: Sequence[Row]) -> list[int]:
    """Return the numbers of the rows where the keep value changes."""
    keeps = [number(row, "keep") for row in rows]
    return [order for order in range(1, len(keeps)) if keeps[order] != keeps[order - 1]]


def _more(meta: Mapping[str, Any]) -> list[str]:
    method = meta.get("method")
    return [method] if isinstance(method, str) else [str(line) for line in method or ()]


def bench_table(rows: Sequence[Row], console: Console) -> None:
    """Print the results to ``console``, best recovery first within each keep value, ours bold."""
    from rich.table import Table

    from quickmerge.terminal import plain

    shown = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    picked = [order for order, header in enumerate(HEADERS) if console.width >= _WIDE or header not in SPARE]
    for order, header in enumerate(HEADERS[order] for order in picked):
        shown.add_column(header, justify="right" if order else "left", no_wrap=True)
    previous: float | None = None
    for row in ranked(overall(rows)):
        keep = number(row, "keep")
        if previous is not None and keep != previous:
            shown.add_row()
        previous = keep
        style = "bold cyan" if is_ours(name_of(row)) else "dim" if is_full(row) else ""
        line = cells(row)
        shown.add_row(*(plain(line[order], style) for order in picked))
    console.print(shown)


def _names(documents: object) -> str:
    """Name the documents, or count them where they are many."""
    if isinstance(documents, Sequence) and not isinstance(documents, str):
        return f"{len(documents)} documents" if len(documents) > _FEW else ", ".join(map(str, documents))
    return str(documents or "")
