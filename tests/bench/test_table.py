"""One definition of a table, in a terminal, on a page and in Markdown."""

from __future__ import annotations

import io
import re
from html import unescape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from quickmerge.bench.table import Column, Table, half_width, interval, number, plus_minus, text, unless

ROWS = [
    {"name": "full", "share": 1.0, "share_low": 1.0, "share_high": 1.0, "seconds": 0.25},
    {"name": "tome", "share": 0.912, "share_low": 0.9, "share_high": 0.92, "seconds": None},
]
COLUMNS = (
    Column("method", text("name")),
    Column("how much is left", interval("share", ".3f"), short=half_width("share", ".3f")),
    Column("time", number("seconds", ".0f", scale=1e3, unit=" ms", none="–"), spare=True),
    Column("labels", text("label"), when=lambda rows: any("label" in row for row in rows)),
)


def printed(table: Table, width: int = 100) -> str:
    stream = io.StringIO()
    table.print(Console(file=stream, width=width))
    return stream.getvalue()


def test_markdown_has_the_whole_cells_and_the_columns_that_are_called_for() -> None:
    assert Table(COLUMNS, ROWS).markdown() == (
        "| method | how much is left | time |\n| --- | ---: | ---: |\n"
        "| full | 1.000 (1.000 to 1.000) | 250 ms |\n| tome | 0.912 (0.900 to 0.920) | – |\n"
    )


def test_a_terminal_has_the_short_ones() -> None:
    lines = [line.split() for line in printed(Table(COLUMNS, ROWS)).splitlines()]
    assert ["tome", "0.912", "±0.010", "–"] in lines and ["full", "1.000", "±0.000", "250", "ms"] in lines


def test_a_narrow_terminal_leaves_out_what_is_spare_and_then_breaks_lines() -> None:
    assert "time" in printed(Table(COLUMNS, ROWS), 40) and "time" not in printed(Table(COLUMNS, ROWS), 22)
    tight = printed(Table(COLUMNS, ROWS), 12)
    assert max(map(len, tight.splitlines())) <= 12 and "…" not in tight


def test_alignment_is_left_and_then_right_unless_said() -> None:
    made = Table([Column("a", text("name")), Column("b", text("name"), "l"), Column("c", text("name"), "c")], ROWS)
    assert made.align == "llc" and "| --- | --- | :---: |" in made.markdown()


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(st.text(alphabet="ab |<>&é1", max_size=6), min_size=2, max_size=2), min_size=1, max_size=4))
def test_a_page_and_markdown_hold_the_same_cells(body: list[list[str]]) -> None:
    made = Table([Column("x", lambda row: row["0"]), Column("y", lambda row: row["1"])], [
        {"0": first, "1": second} for first, second in body
    ])  # fmt: skip
    cells = re.findall(r'<t[dh](?: scope="row")? class="[lr]">(.*?)</t[dh]>', made.html().split("<tbody>")[1])
    assert [unescape(cell) for cell in cells] == [cell for row in body for cell in row]
    lines = made.markdown().splitlines()[2:]
    assert [[cell.replace("\\|", "|") for cell in re.split(r"(?<!\\)\| ", line)[1:]] for line in lines] == [
        [first + " ", second + " |"] for first, second in body
    ]


@pytest.mark.parametrize(
    ("cell", "row", "words"),
    [
        (text("a"), {}, ""),
        (number("a", ".1f", scale=100, unit=" %"), {"a": 0.25}, "25.0 %"),
        (number("a", none="–"), {"a": None}, "–"),
        (interval("a", "+.2f", unit="x"), {"a": 1, "a_low": 0.5, "a_high": 2}, "+1.00x (+0.50 to +2.00)"),
        (interval("a", ".0f", ends=("q1", "q3"), base=""), {"a": 1, "q1": 0, "q3": 2}, "1 (0 to 2)"),
        (interval("a", ".0f"), {}, ""),
        (half_width("a", "+.1f", scale=100), {"a": 0.1, "a_low": 0.0, "a_high": 0.2}, "+10.0 ±10.0"),
        (plus_minus("a", "+.2f", "_sd"), {"a": -0.0001, "a_sd": 0.5}, "+0.00 ± 0.50"),
        (unless(lambda r: r["a"] == 1, text("a"), "one"), {"a": 1}, "one"),
        (unless(lambda r: r["a"] == 1, text("a"), "one"), {"a": 2}, "2"),
    ],
)
def test_cells(cell, row: dict[str, object], words: str) -> None:
    assert cell(row) == words
