"""The page of a benchmark: every part in its place, and no text of others as markup."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from report_samples import HOSTILE, Parsed
from rich.console import Console

from quickmerge.bench.report import Report, Section
from quickmerge.bench.table import Column, Table, text
from quickmerge.viz.charts import picture
from quickmerge.viz.drawing import Theme, new_figure


def report(words: str = "x") -> Report:
    def draw(theme: Theme):
        figure = new_figure(1, 1)
        figure.text(0, 0, "drawn", color=theme.ink)
        return figure

    table = Table(
        [Column(words, text("name")), Column("b", text("name"))], [{"name": words}, {"name": "ours"}, {"name": "last"}],
        strong=lambda row: row["name"] == "ours", group=lambda row: row["name"] == "last",
    )  # fmt: skip
    sections = [Section(words, charts=[(picture(draw, words), words)]), Section(words, table, words)]
    return Report(words, sections, [words, words], {words: {words: 1}, "more": [words, 2]}, words, words)


def test_the_parts_stand_in_this_order() -> None:
    html = report().html()
    tags = [tag for tag in Parsed(html).tags if tag in ("h1", "h2", "p", "picture", "table", "caption")]
    # the brand and the subtitle around the title, the verdict, two sections, the notes, the facts
    assert tags == ["p", "h1", "p", "p", "h2", "picture", "h2", "table", "caption", "h2", "p", "p", "table"]
    for name, row in (("strong", "ours"), ("ruled", "last")):
        assert re.search(rf'<tr class="{name}">\s*<th[^>]*>{row}', html)
    assert "more" in html and "x, 2" in html and not Parsed(html).open


def test_what_is_not_there_leaves_no_heading() -> None:
    html = Report("x", []).html()
    assert "<h2>" not in html and "this run" not in html and 'class="lead"' not in html and 'class="sub"' not in html


@pytest.mark.parametrize("words", HOSTILE)
def test_no_part_becomes_markup(words: str) -> None:
    made, wanted = Parsed(report(words).html()), Parsed(report().html())
    assert made.tags == wanted.tags and not made.open
    assert [(tag, name) for tag, name, _ in made.attributes] == [(tag, name) for tag, name, _ in wanted.attributes]


def test_a_page_is_written_whole(tmp_path: Path) -> None:
    target = report().write(tmp_path / "new" / "r.html")
    assert target.read_text(encoding="utf-8") == report().html()
    assert [path.name for path in target.parent.iterdir()] == ["r.html"]


def test_a_terminal_gets_the_tables_that_are_for_it_and_what_their_cells_mean() -> None:
    def printed(*sections: Section) -> str:
        stream = io.StringIO()
        Report("title", sections, ["note"], legend="a legend").print(Console(file=stream, width=80))
        return stream.getvalue()

    table = Table([Column("a", text("name"))], [{"name": "[red]one"}])
    first, second = Section("first", table, "a caption"), Section("second", table)
    alone = printed(first, Section("chart"), Section("hidden", table, printed=False))
    assert alone.count("[red]one") == 1 and "a caption" in alone and alone.rstrip().endswith("a legend")
    assert "first" not in alone and "hidden" not in alone and "note" not in alone
    both = printed(first, second)
    assert both.index("first") < both.index("second") and both.count("[red]one") == 2
