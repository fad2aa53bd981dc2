"""The benchmark of answers in a terminal and on a page."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from quickmerge.merge.bench.vlm import answers_report, ordered

META = {"model": "a <model>", "images": 64, "folder": "scenes", "environment": {"torch": "2"}}
KINDS = ("colour", "count", "exists", "read", "what", "where")


def row(method: str, keep: float, kept: float, exact: float, timed: bool = True) -> dict[str, Any]:
    times = {"seconds": 1.234, "speedup": 1.4, "reducer_seconds": 0.0204, "cache_bytes": 3 * 2**19}
    return {
        "method": method, "keep": keep, "images": 64, "questions": 600, "visual_in": 256, "visual_kept": kept,
        "exact": exact, "exact_low": exact - 0.03, "exact_high": exact + 0.03,
        "change": exact - 0.7, "change_low": exact - 0.75, "change_high": exact - 0.65,
        "kinds": {kind: {"questions": 100, "exact": exact + 0.01 * index} for index, kind in enumerate(KINDS)},
        **(times if timed else {}),
    }  # fmt: skip


def rows(timed: bool = True) -> list[dict[str, Any]]:
    return [
        row("full", 1.0, 256, 0.7, timed),
        row("random", 0.25, 64, 0.31, timed),
        row("trimtokenator", 0.25, 64, 0.52, timed),
        row("smaller images", 0.5, 121, 0.6, timed),
    ]


def printed(width: int, timed: bool = True) -> list[str]:
    text = io.StringIO()
    answers_report(rows(timed), META).print(Console(file=text, width=width))
    return [" ".join(line.split()) for line in text.getvalue().splitlines()]


@pytest.mark.parametrize("timed", [True, False])
def test_a_terminal_gets_a_table_of_costs_and_one_of_kinds(timed: bool) -> None:
    text = io.StringIO()
    answers_report(rows(timed), META).print(Console(file=text, width=80))
    assert max(map(len, text.getvalue().splitlines())) <= 80 and "…" not in text.getvalue()
    lines = printed(80, timed)
    assert "full 256 70.0 ±3.0 –" + (" 1234 1.40x 20 1.5" if timed else "") in lines
    assert "trimtokenator 64 52.0 ±3.0 -18.0 ±5.0" + (" 1234 1.40x 20 1.5" if timed else "") in lines
    assert "trimtokenator 64 52 53 54 55 56 57" in lines
    assert "600 questions about 64 images: 100 colour," in " ".join(lines)


def test_rows_go_by_share_and_then_by_what_is_right() -> None:
    assert [one["method"] for one in ordered(rows())] == ["full", "smaller images", "trimtokenator", "random"]
    # A method that keeps everything is not the unmodified model.
    assert ordered([row("tome", 1.0, 256, 0.9), row("full", 1.0, 256, 0.7)])[0]["method"] == "full"


def test_a_kind_that_a_row_lacks_is_a_dash() -> None:
    some = rows(timed=False)
    del some[1]["kinds"]["read"]
    text = io.StringIO()
    answers_report(some, META).print(Console(file=text, width=200))
    *_, line = (line for line in text.getvalue().splitlines() if "random" in line)
    assert line.split()[-6:] == ["31", "32", "33", "–", "35", "36"]


def test_the_page_has_every_number() -> None:
    page = answers_report(rows(), META).html()
    for words in (
        "a &lt;model&gt;",
        "121 of 256",
        "-18.0 ±5.0",
        "smaller images",
        "Right, by kind of question",
        "where",
    ):
        assert words in page
