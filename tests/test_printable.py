"""No text of others reaches a terminal with anything that a terminal would obey, and no name is disguised."""

from __future__ import annotations

import io
import unicodedata

from hypothesis import given
from hypothesis import strategies as st
from rich.progress import Progress
from rich.table import Table

from quickmerge.errors import clean, clean_name
from quickmerge.terminal import PlainColumn, Terminal, plain
from quickmerge.viz.format import shown_name

HOSTILE = [
    "\x1b[31mred",
    "[red]red[/]",
    "[/]",
    "[link=http://x]y[/link]",
    ":smile:",
    "a\x9bb",
    "\x7f",
    "a\ud800b",
    "\x07",
]
ANY = st.one_of(st.sampled_from(HOSTILE), st.text(), st.text(alphabet="[]/ab:\x1b\x9b\x07\u202e\ud800\n"))


def obeyed(text: str) -> list[str]:
    return [c for c in text if (unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t")]


@given(ANY)
def test_clean_leaves_no_controls_and_a_name_nothing_hidden(text: str) -> None:
    assert not obeyed(clean(text))
    name = clean_name(text)
    assert not obeyed(name) and "\n" not in name and "\t" not in name
    assert not [c for c in name if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI",
                                                                    "FSI", "PDI")]  # fmt: skip
    assert clean_name(name) == name and "\u202e" not in shown_name(text)


def test_a_disguised_name_shows_what_it_is() -> None:
    assert clean_name("gpj.\u202eexe") == "gpj.\\u202eexe"
    assert clean_name("a\nb\x1b[31m\udcff") == "a\\x0ab\\x1b[31m\\udcff"
    assert clean_name("דג ים 日本 é 🐟") == "דג ים 日本 é 🐟"


@given(ANY)
def test_the_terminal_prints_texts_letter_by_letter(text: str) -> None:
    made = io.StringIO()
    made.isatty = lambda: True  # type: ignore[method-assign]
    console = Terminal(file=made, soft_wrap=True)
    console.print(text, highlight=False, soft_wrap=True)
    assert made.getvalue().split() == clean(text).split()


@given(ANY)
def test_tables_statuses_and_bars_neither_obey_nor_parse(text: str) -> None:
    made = io.StringIO()
    console = Terminal(file=made)
    table = Table("x", title=text)
    table.add_row(text)
    table.add_row(plain(text))
    console.print(table)
    with console.status(text):
        pass
    with Progress(PlainColumn(), console=console) as bar:
        bar.add_task(text)
    assert not obeyed(made.getvalue())
