from __future__ import annotations

import base64
import hashlib
import os
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from report_samples import Parsed, cells_for, demo, rows

from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.text import bench_report
from quickmerge.merge.demo import demo_report
from quickmerge.viz.drawing import DARK, LIGHT, ON_SLOT, SLOT_COLORS, rgb, tint_alpha
from quickmerge.viz.page import cards, heading, page, paragraph, table, write_page
from quickmerge.viz.render import asset
from quickmerge.viz.tokenmap import token_map_html

PAGES = {
    "demo": lambda: demo_report(demo()),
    "bench": lambda: bench_report(rows(kinds=True), {"model": "some/model"}).html(),
}


@pytest.mark.parametrize("name", PAGES)
def test_page_asks_for_nothing_outside_itself(name: str) -> None:
    html = PAGES[name]()
    parsed = Parsed(html)
    for tag, attribute, value in parsed.attributes:
        if attribute in ("src", "href", "xlink:href", "action", "srcset", "poster", "data"):
            assert value.startswith(("#", "data:")), (tag, attribute, value)
        if attribute != "xmlns":
            assert not re.search(r"https?://|^//", value), (tag, attribute, value)
    assert not {"iframe", "object", "embed", "base", "form"} & set(parsed.tags)
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) <= set(re.findall(r"url\((#[^)]*)\)", html))


@pytest.mark.parametrize("name", PAGES)
def test_policy_allows_exactly_the_styles_and_scripts_of_the_page(name: str) -> None:
    html = PAGES[name]()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', html)
    assert policy is not None and "default-src 'none'" in policy[1] and "unsafe" not in policy[1]
    for body in re.findall(r"<(?:style|script)>(.*?)</(?:style|script)>", html, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy[1]
    parsed = Parsed(html)
    # The policy would block these, so the page must not rely on them.
    assert not [item for item in parsed.attributes if item[1] == "style" or item[1].startswith("on")]


@pytest.mark.parametrize("name", PAGES)
def test_page_is_the_same_every_time_and_its_ids_are_unique(name: str) -> None:
    html = PAGES[name]()
    assert html == PAGES[name]()
    ids = [value for _, attribute, value in Parsed(html).attributes if attribute == "id"]
    assert len(ids) == len(set(ids))


def test_tables_check_their_shape() -> None:
    with pytest.raises(QuickmergeError, match="1 cells where there are 2"):
        table(["a", "b"], [["only one"]])
    with pytest.raises(QuickmergeError, match="alignment"):
        table(["a", "b"], [], align="l")
    with pytest.raises(QuickmergeError, match="level"):
        heading("x", 1)


def test_write_page_creates_folders_replaces_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "report.html"
    write_page(target, "first")
    assert write_page(target, page("lone \ud800", [paragraph("\udfff"), "raw \ud800"])) == target
    assert "lone \ufffd" in target.read_text(encoding="utf-8")
    assert [path.name for path in target.parent.iterdir()] == ["report.html"]
    assert target.stat().st_mode & 0o777 == 0o666 & ~_umask()


def test_write_page_says_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(QuickmergeError, match="can't be written"):
        write_page(tmp_path / "file" / "report.html", "x")
    (tmp_path / "taken").mkdir()
    with pytest.raises(QuickmergeError, match="can't be written"):
        write_page(tmp_path / "taken", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken"]
    with pytest.raises(QuickmergeError, match="names a folder"):
        write_page("/", "x")
    with pytest.raises(QuickmergeError, match="can't be written"):
        write_page(tmp_path / "nul\x00.html", "x")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_write_page_to_a_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(QuickmergeError, match="Permission denied"):
        write_page(tmp_path / "report.html", "x")


def test_two_maps_in_one_page_share_one_policy() -> None:
    maps = [token_map_html(cells_for(["a", "b"]), title=name, caption="") for name in ("one", "two")]
    assert Parsed(page("x", [cards([("a", "b", "c")]), *maps])).tags.count("script") == 2


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_styles_have_the_colours_of_the_drawings() -> None:
    def variables(css: str, block: str) -> dict[str, str]:
        """The variables of a scheme, the light one first in a style, the dark one behind its condition."""
        return dict(re.findall(r"--(\w+): (#\w+);", css.split(block)[1].split("}")[0]))

    style, tokens = asset("style.css"), asset("tokenmap.css")
    dark = "(prefers-color-scheme:dark) {"
    for theme, css in ((LIGHT, style), (DARK, style.split(dark)[1])):
        assert variables(css, ":root {") == asdict(theme)
    names = {"qi": "ink", "qu": "muted", "qf": "faint", "ql": "line", "qc": "card", "qk": "chip", "qa": "accent"}
    for theme, css in ((LIGHT, tokens), (DARK, tokens.split(dark)[1])):
        found = variables(css, ".qm-map {")
        assert {key: found[key] for key in names} == {key: getattr(theme, role) for key, role in names.items()}
    for order, color in enumerate(SLOT_COLORS):
        assert f".qm-map .c{order} {{ --c: {' '.join(map(str, rgb(color)))}; }}" in tokens
    for level in range(10):
        assert f".qm-map .w{level} {{ --a: {tint_alpha(level):.3f}; }}" in tokens
    assert f"color: {ON_SLOT};" in tokens
    assert {SLOT_COLORS[0], SLOT_COLORS[1]} <= set(re.findall(r'fill="(#\w+)"', page("x", [])))
