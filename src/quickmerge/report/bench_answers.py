"""The benchmark of vision-language models in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quickmerge.report.blocks import heading, paragraph, table
from quickmerge.report.loose import facts
from quickmerge.report.page import page, write_page

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Rows = Sequence[Mapping[str, Any]]

_FIRST = ["method", "visual tokens"]
_CAPTION = "% of the questions answered to the letter; ± is half of the 95 % interval over pictures"
_METHOD = (
    "Right is the % of the questions that greedy decoding answers to the letter; change is that minus the model as it "
    "is, on the same questions. ± is half of the 95 % interval over pictures drawn with replacement.",
    "Milliseconds are from a picture and a question to the first token: vision tower, method and language model. "
    "Methods took turns, and speed-up is the time of the model as it is over the method's. The cache is as the prompt "
    "left it.",
)


def kinds_of(rows: Rows) -> list[str]:
    """Every kind of question, in order."""
    return list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))


def cost_headers(rows: Rows, reducer: bool = True) -> list[str]:
    """What the columns beside method and tokens are called; those of time are there only where it was taken."""
    timed = ["ms to answer", "speed-up", *(["reducer ms"] if reducer else []), "cache MiB"]
    return ["right", "change", *(timed if "seconds" in rows[0] else [])]


def cost_cells(row: Mapping[str, Any], reducer: bool = True) -> list[str]:
    """One line of these columns."""
    full = row["method"] == "full"
    cells = [
        f"{100 * row['exact']:.1f} ±{50 * (row['exact_high'] - row['exact_low']):.1f}",
        "–" if full else f"{100 * row['change']:+.1f} ±{50 * (row['change_high'] - row['change_low']):.1f}",
    ]
    if "seconds" in row:
        own = [f"{1e3 * row['reducer_seconds']:.0f}"] if reducer else []
        cells += [f"{1e3 * row['seconds']:.0f}", f"{row['speedup']:.2f}x", *own, f"{row['cache_bytes'] / 2**20:.1f}"]
    return cells


def kind_cells(row: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    """The % of right answers to each kind of question."""
    return [f"{100 * row['kinds'][kind]['exact']:.0f}" if kind in row["kinds"] else "–" for kind in kinds]


def answers_table(rows: Rows, console: Console) -> None:
    """Print the rows, by share and the most right first; as two tables where one is too wide."""
    from quickmerge.terminal import plain

    kinds, body = kinds_of(rows), ordered(rows)
    first = [[row["method"], f"{row['visual_kept']:.0f}"] for row in body]
    asked = [kind_cells(row, kinds) for row in body]
    costs = [cost_cells(row) for row in body]
    whole = _table(cost_headers(rows) + kinds, first, [a + b for a, b in zip(costs, asked, strict=True)])
    whole.caption = _CAPTION
    if console.measure(whole, options=console.options.update(width=1000)).maximum <= console.width:
        console.print(whole)
        return
    cost = _table(cost_headers(rows, reducer=False), first, [cost_cells(row, reducer=False) for row in body])
    by_kind = _table(kinds, first, asked)
    cost.caption, by_kind.caption = _CAPTION, plain(_questions(rows))
    console.print(cost)
    console.print(by_kind)


def write_answers_report(path: Path, rows: Rows, meta: Mapping[str, Any]) -> None:
    """Write the rows and what was measured as a page."""
    kinds, body = kinds_of(rows), ordered(rows)
    first = [[row["method"], f"{row['visual_kept']:.0f} of {row['visual_in']:.0f}"] for row in body]
    cost, asked = [*_FIRST, *cost_headers(rows)], [*_FIRST, *kinds]
    blocks = [
        heading("What is still answered, for what it costs"),
        table(cost, [a + cost_cells(row) for a, row in zip(first, body, strict=True)], align=_align(cost)),
        *(paragraph(words) for words in _METHOD),
        heading("Right, by kind of question"),
        table(
            asked, [a + kind_cells(row, kinds) for a, row in zip(first, body, strict=True)], align=_align(asked),
            caption=_questions(rows),
        ),
        table(["", "this run"], facts(meta), align="ll"),
    ]  # fmt: skip
    write_page(path, page(f"{meta['model']}: fewer visual tokens on {_several(meta['images'], 'picture')}", blocks))


def ordered(rows: Rows) -> list[Mapping[str, Any]]:
    """The model as it is, then by the share that was asked for, most right answers first."""
    return sorted(rows, key=lambda row: (row["method"] != "full", -row["keep"], -row["exact"]))


def _table(headers: Sequence[str], first: Sequence[list[str]], rest: Sequence[list[str]]) -> Table:
    from rich.table import Table

    from quickmerge.terminal import plain

    printed = Table()
    for name in (*_FIRST, *headers):
        # Names take a line for each word, so that most tables fit, and cells one line.
        lines = plain("\n".join(name.split()))
        printed.add_column(lines, justify="left" if name == _FIRST[0] else "right", no_wrap=True)
    for start, end in zip(first, rest, strict=True):
        printed.add_row(*map(plain, [*start, *end]))
    return printed


def _align(headers: Sequence[str]) -> str:
    return "l" + "r" * (len(headers) - 1)


def _questions(rows: Rows) -> str:
    row = rows[0]
    told = ", ".join(f"{found['questions']:,} {kind}" for kind, found in row["kinds"].items())
    return f"{_several(row['questions'], 'question')} about {_several(row['pictures'], 'picture')}: {told}"


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
