"""No text of a document, a model or a user ever becomes markup."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_samples import HOSTILE, Parsed, cells_for, demo, rows

from quickmerge.merge.bench.text import bench_report
from quickmerge.merge.demo import demo_report
from quickmerge.viz.format import clean, one_line, split_lead
from quickmerge.viz.page import cards, columns, details, heading, lead, page, paragraph, table
from quickmerge.viz.tokenmap import token_map_html

# Everything a str can hold, lone surrogates included, with markup far likelier than chance.
ANY_TEXT = st.one_of(
    st.sampled_from(HOSTILE), st.text(alphabet=st.characters()), st.text(alphabet="<>&\"'/= \n\r\tascript:\x00\ud800")
)
TOKEN_MAP_TAGS = {"figure", "style", "figcaption", "strong", "span", "p", "ul", "li", "em", "svg", "title", "rect"} | {
    "div",
    "b",
    "script",
    "details",
    "summary",
}
ATTRIBUTES = {"class", "data-s", "title", "dir", "hidden", "viewbox", "preserveaspectratio", "role", "x", "y"} | {
    "width",
    "height",
}


@given(ANY_TEXT)
def test_clean_text_always_fits_in_utf8_and_holds_no_controls(text: str) -> None:
    made = clean(text)
    made.encode("utf-8")
    assert not [char for char in made if char < " " and char not in "\n\t"]
    assert clean(made) == made


def test_clean_joins_surrogate_pairs_and_replaces_lone_ones() -> None:
    assert clean("\ud83d\ude00") == "😀"
    assert clean("a\ud83db") == "a\ufffdb"
    assert clean("\x00\x1b\x7f\x9b") == "␀␛␡\ufffd"
    assert clean("a\r\nb\rc") == "a\nb␍c"


@given(ANY_TEXT)
def test_escaped_text_comes_back_from_a_parser(text: str) -> None:
    assert "".join(Parsed(paragraph(text)).texts) == clean(text)


@given(ANY_TEXT)
def test_split_lead_loses_nothing(text: str) -> None:
    assert "".join(split_lead(text)) == text


def test_one_line_is_one_line_and_short() -> None:
    assert one_line("a\nb\tc") == "a↵b⇥c"
    assert len(one_line("x" * 500, 20)) == 20


@settings(deadline=None)
@given(st.lists(ANY_TEXT, min_size=1, max_size=12), ANY_TEXT, ANY_TEXT, st.integers(1, 12) | st.none())
def test_token_map_gives_the_document_back_and_nothing_of_it_is_markup(
    texts: list[str], title: str, caption: str, fold: int | None
) -> None:
    cells = cells_for(texts)
    parsed = Parsed(token_map_html(cells, title=title, caption=caption, fold_after=fold))
    assert not parsed.open
    assert set(parsed.tags) <= TOKEN_MAP_TAGS
    assert {name for _, name, _ in parsed.attributes} <= ATTRIBUTES
    assert parsed.tags.count("script") == parsed.tags.count("style") == 1
    assert "".join(parsed.document) == "".join(clean(text) for text in texts)


TURNS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u200e\u200f"


@settings(deadline=None)
@given(st.text(alphabet="gpj.exe <>\n" + TURNS, min_size=1))
def test_names_and_labels_show_what_turns_the_direction_of_reading(text: str) -> None:
    cells = cells_for(["a", "b"])
    made = page(text, [
        heading(text), table([text, "x"], [[text, text]], caption=text), cards([(text, text, text)]), details(text, ""),
        token_map_html(cells, title=text, caption=text),
    ], subtitle=text)  # fmt: skip
    assert not set(made) & set(TURNS)
    assert all(f"\\u{ord(letter):04x}" in made for letter in set(text) & set(TURNS))


@settings(deadline=None)
@given(ANY_TEXT)
def test_no_block_lets_text_become_markup(text: str) -> None:
    blocks = [
        heading(text),
        heading(text, 3),
        lead(text),
        paragraph(text),
        table([text, text], [[text, text]], caption=text or "x"),
        cards([(text, text, text)]),
        columns(text, text, text, text),
        details(text, paragraph(text)),
    ]
    plain = page("x", [*blocks, ""], subtitle="x")
    for block, same in zip(blocks, _plain_blocks(), strict=True):
        made, wanted = Parsed(block), Parsed(same)
        assert made.tags == wanted.tags
        # Only the class of a long table cell depends on the text.
        assert [(tag, name) for tag, name, _ in made.attributes] == [(tag, name) for tag, name, _ in wanted.attributes]
        assert not made.open
    assert Parsed(page(text, blocks, subtitle=text or "x")).tags == Parsed(plain).tags


def _plain_blocks() -> list[str]:
    return [
        heading("x"),
        heading("x", 3),
        lead("x"),
        paragraph("x"),
        table(["x", "x"], [["x", "x"]], caption="x"),
        cards([("x", "x", "x")]),
        columns("x", "x", "x", "x"),
        details("x", paragraph("x")),
    ]


@cache
def _harmless_demo() -> Parsed:
    return Parsed(demo_report(demo()))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_demo_has_the_tags_of_a_harmless_one(text: str) -> None:
    hostile = demo()
    for key in ("model", "document_name", "question", "reducer"):
        hostile[key] = text
    hostile["hardware"] = {text: text}
    hostile["versions"] = {text: text, "torch": text}
    for run in ("full", "reduced"):
        hostile[run] = hostile[run] | {"answer": f"{text} {run}"}
    made, wanted = Parsed(demo_report(hostile)), _harmless_demo()
    assert made.tags == wanted.tags
    assert [(tag, name) for tag, name, _ in made.attributes] == [(tag, name) for tag, name, _ in wanted.attributes]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_benchmark_runs_no_script(text: str) -> None:
    named = [row | {"reducer": text if row["reducer"] == "random" else row["reducer"]} for row in rows()]
    parsed = Parsed(bench_report(named, {"model": text, "method": text, "interval": text, text: text}).html())
    assert "script" not in parsed.tags
    assert not [name for _, name, _ in parsed.attributes if name.startswith("on")]
    assert not parsed.open
