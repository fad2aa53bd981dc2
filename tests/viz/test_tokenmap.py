from __future__ import annotations

import io
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import HOSTILE, Parsed, cell, cells_for
from rich.console import Console

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import SLOT_COLORS, rgb, tint_alpha, tint_level
from quickmerge.viz.format import clean
from quickmerge.viz.tokenmap import Slots, State, TokenCell, summary, token_map_html, token_map_text
from quickmerge.viz.tokenmap_figure import lay_out, token_map_figure, width_of

CELLS = [
    cell("The", 0, position=0, protected=True),
    cell(" light", 1, 0.7, position=1, saliency=0.25),
    cell("house", 1, 0.3, anchor=False, position=2),
    cell(" at", -1, 0.0, anchor=False, position=3),
    cell("\n", 1, 0.0, anchor=False, position=4),
]


def test_states_and_summary() -> None:
    slots = Slots(CELLS)
    wanted = [State.ALONE, State.LEADS, State.MERGED, State.DROPPED, State.MERGED]
    assert [slots.state(one) for one in CELLS] == wanted
    assert summary(slots) == "5 tokens → 2 slots"
    assert slots.counts() == {State.ALONE: 1, State.LEADS: 1, State.MERGED: 2, State.DROPPED: 1}


def test_tooltip_tells_token_slot_weight_and_members() -> None:
    slots = Slots(CELLS)
    words = slots.describe(CELLS[1])
    assert words == (
        "“ light” (token 1) · leads slot 1 · 70% of it · slot holds “ light”, “house”, “↵” · saliency 0.25"
    )
    assert slots.describe(CELLS[3]) == "“ at” (token 3) · dropped"
    assert "protected" in slots.describe(CELLS[0])
    crowd = Slots([cell(f"t{order}", 0, 0.01, anchor=order == 0, position=order) for order in range(500)])
    assert crowd.describe(crowd.cells[3]).endswith("and 492 more") and len(crowd.describe(crowd.cells[3])) < 400


def test_map_marks_every_state_and_breaks_lines() -> None:
    html = token_map_html(CELLS, title="A title", caption="A caption.")
    for classes in ('class="t k p"', 'class="t a c0"', 'class="t m c0 w5"', 'class="t d"', "<b></b>\n"):
        assert classes in html
    assert html.count('data-s="1"') == 3
    assert "A title" in html and "A caption." in html and "5 tokens → 2 slots" in html


def test_map_folds_a_long_document() -> None:
    cells = cells_for([" word"] * 40)
    html = token_map_html(cells, title="x", caption="", fold_after=30)
    assert "Show the other 10 tokens" in html
    assert "".join(Parsed(html).document) == " word" * 40
    assert "<details" not in token_map_html(cells, title="x", caption="", fold_after=40)


def test_empty_map_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="at least one token"):
        token_map_html([], title="x", caption="")
    with pytest.raises(QuickmergeError, match="at least one token"):
        token_map_figure([], tmp_path / "x.png", title="x")


def test_terminal_map_shows_text_as_it_is() -> None:
    stream = io.StringIO()
    cells = [*CELLS, cell("[bold]not markup[/]", 2, position=5), *cells_for(list(HOSTILE))]
    token_map_text(cells, Console(file=stream, width=200, force_terminal=True, color_system="truecolor"))
    out = stream.getvalue()
    assert "[bold]not markup[/]" in out
    assert "↵" in out and " \x1b[2;9mat" in out  # dim and struck through
    assert "\x07" not in out and "\x1b[31m DEL" not in out
    out.encode("utf-8")


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("dark", [False, True])
def test_image_is_written_and_the_same_every_time(tmp_path: Path, suffix: str, dark: bool) -> None:
    paths = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for path in paths:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Wide, combining, missing and dollar characters must neither warn nor be read as mathematics.
            token_map_figure(
                cells_for(["The", " 谢谢", " e\u0301", " \U0001f600", " $x^2$", "\t", *HOSTILE]),
                path,
                title="$a$",
                dark=dark,
            )
    content = paths[0].read_bytes()
    assert content == paths[1].read_bytes()
    assert content.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert b"<dc:date>" not in content


def test_image_checks_its_arguments(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match=r"\.png or \.svg"):
        token_map_figure(CELLS, tmp_path / "map.jpg", title="x")
    with pytest.raises(QuickmergeError, match="20 columns"):
        token_map_figure(CELLS, tmp_path / "map.png", title="x", columns=5)
    with pytest.raises(QuickmergeError, match="does not fit"):
        token_map_figure([cell("x" * 100, 0)], tmp_path / "map.png", title="x", columns=20, max_lines=2)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=30), st.integers(4, 40), st.integers(1, 6))
def test_layout_stays_inside_and_keeps_the_order(texts: list[str], columns: int, lines: int) -> None:
    cells = cells_for(texts)
    pieces, shown = lay_out(cells, columns, lines)
    assert 0 <= shown <= len(cells)
    last = (-1, -1)
    for piece in pieces:
        assert 0 <= piece.line < lines and piece.column + piece.width <= columns
        assert piece.width == width_of(piece.text) and piece.cell < shown
        assert (piece.line, piece.column) > last
        last = (piece.line, piece.column + piece.width - 1)
    wanted = "".join(clean(one.text) for one in cells[:shown]).replace("\t", " ").replace("\n", "↵").replace(" ", "")
    # Characters without width of their own may be left out at a break; everything else is there, in order.
    drawn = "".join(piece.text for piece in pieces).replace(" ", "")
    assert [c for c in drawn if width_of(c)] == [c for c in wanted if width_of(c)]


def test_layout_breaks_before_words() -> None:
    pieces, shown = lay_out([cell(text, 0) for text in ("one", " two", " thr", "ee")], 8, 9)
    assert shown == 4
    assert [(piece.line, piece.column, piece.text) for piece in pieces] == [
        (0, 0, "one"),
        (0, 3, " two"),
        (1, 0, "thr"),
        (1, 3, "ee"),
    ]


def test_tint_grows_with_the_share() -> None:
    levels = [tint_level(weight) for weight in (float("nan"), -1, 0, 0.1, 0.5, 1, 7)]
    assert levels == sorted(levels) and levels[0] == 0 and levels[-1] == 9
    assert all(0 < tint_alpha(level) < 1 for level in range(10))


# Machado, Oliveira and Fernandes (2009), severity 1.0, on linear light.
_VISION = {
    "protanopia": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deuteranopia": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritanopia": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


@pytest.mark.parametrize("vision", _VISION)
def test_neighbouring_slots_differ_for_colour_blind_readers(vision: str) -> None:
    def seen(color: str) -> tuple[float, ...]:
        linear = [(channel / 255) ** 2.2 for channel in rgb(color)]
        mixed = (sum(a * b for a, b in zip(line, linear, strict=True)) for line in _VISION[vision])
        return tuple(255 * max(0.0, min(1.0, value)) ** (1 / 2.2) for value in mixed)

    for color, following in zip(SLOT_COLORS, (*SLOT_COLORS[1:], SLOT_COLORS[0]), strict=True):
        apart = sum((a - b) ** 2 for a, b in zip(seen(color), seen(following), strict=True)) ** 0.5
        assert apart > 40, (vision, color, following, apart)


def test_cells_are_plain_values() -> None:
    assert CELLS[0] == TokenCell("The", 0, 1.0, True, True, None, 0)
