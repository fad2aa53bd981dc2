from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from report_samples import rows

from quickmerge.bench.pareto import pareto_png, pareto_svg
from quickmerge.errors import QuickmergeError
from quickmerge.viz.charts import bars_svg, layers_svg
from quickmerge.viz.drawing import LIGHT

DRAWINGS: dict[str, Callable[[], str]] = {
    "pareto": lambda: pareto_svg(rows()),
    "pareto_seconds": lambda: pareto_svg(rows(), x="prefill_seconds"),
    "pareto_cache": lambda: pareto_svg(rows(), x="cache_ratio"),
    "pareto_nll": lambda: pareto_svg(rows(), y="nll"),
    "layers": lambda: layers_svg([2300] * 6 + [575] * 18, 2300),
    "bars": lambda: bars_svg({"reading": 1.8, "answering": 2.4}, {"reading": 0.6, "answering": 2.2}),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_svg_is_bare_stable_and_follows_the_page(name: str) -> None:
    svg = DRAWINGS[name]()
    assert svg == DRAWINGS[name]()
    for unwanted in ("<metadata", "rdf:", "<style", "style=", "<?xml", "<!DOCTYPE", "xlink", "dc:date"):
        assert unwanted not in svg
    root = ET.fromstring(svg)
    assert root.get("role") == "img" and root.get("aria-label")
    assert f"var(--accent, {LIGHT.accent})" in svg
    for element in root.iter():
        for attribute, value in element.attrib.items():
            assert "http" not in value, (attribute, value)
        # A colour the page does not know of would stay the same in the dark.
        for attribute in ("fill", "stroke"):
            assert element.get(attribute, "none").startswith(("none", "var(--", "url(#")), element.attrib


def words_of(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter() if element.tag.endswith("text")]


def test_every_reducer_is_named_and_the_full_prompt_marked() -> None:
    words = words_of(pareto_svg(rows()))
    for name in (
        "quickmerge",
        "random",
        "truncate",
        "full prompt",
        "keep 12.5%",
        "50%",
        "as good as the full document",
    ):
        assert name in words


def test_many_reducers_get_a_legend() -> None:
    many = [row | {"reducer": f"{row['reducer']}-{copy}"} for row in rows() for copy in range(5)]
    words = words_of(pareto_svg(many))
    assert all(str(row["reducer"]) in words for row in many)


def test_a_hopeless_reducer_does_not_squash_the_others() -> None:
    worst = [row | {"recovery": -40.0, "recovery_low": -41.0, "recovery_high": -39.0} for row in rows()[-3:]]
    assert "off the scale: truncate" in words_of(pareto_svg([*rows()[:-3], *worst]))


def test_gaps_and_missing_intervals_are_fine() -> None:
    holey = [row | {"recovery_low": None, "recovery_high": float("nan")} for row in rows()]
    holey[0]["recovery"] = None
    del holey[1]["flops_ratio"]
    pareto_svg(holey)
    with pytest.raises(QuickmergeError, match="nothing to draw"):
        pareto_svg([row | {"recovery": None} for row in rows()])
    with pytest.raises(QuickmergeError, match="nothing to draw"):
        pareto_svg([])
    with pytest.raises(QuickmergeError, match="Cannot draw against"):
        pareto_svg(rows(), x="colour")  # type: ignore[arg-type]
    with pytest.raises(QuickmergeError, match="needs a number"):
        pareto_svg([rows()[0] | {"recovery": "high"}])
    with pytest.raises(QuickmergeError, match="name of its reducer"):
        pareto_svg([{"keep": 0.5}])


def test_names_are_not_mathematics_and_not_markup() -> None:
    odd = [row | {"reducer": "$\\frac{1}$ <b>&\x00\ud800"} for row in rows()]
    assert "$\\frac{1}$ <b>&␀\ufffd" in words_of(pareto_svg(odd))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_file_is_the_same_every_time(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two"):
        pareto_png(tmp_path / "new" / f"{name}.{suffix}", rows(), dark=name == "dark")
    one, two = ((tmp_path / "new" / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    with pytest.raises(QuickmergeError, match=r"\.png or \.svg"):
        pareto_png(tmp_path / "x.pdf", rows())


def test_layers_names_only_the_steps_that_matter() -> None:
    assert "575 tokens" in words_of(layers_svg([2300, 575, 575], 2300))
    gradual = [2300 - 10 * layer for layer in range(24)]
    assert not [word for word in words_of(layers_svg(gradual, 2300)) if word.endswith(" tokens")]
    with pytest.raises(QuickmergeError, match="at least one layer"):
        layers_svg([], 10)


def test_bars_add_up() -> None:
    words = words_of(bars_svg({"a": 1.0, "b": 2.0}, {"a": 0.5}, before_label="then", after_label="now"))
    assert "3.00\u00a0s" in words and "0.50\u00a0s" in words and "then" in words and "now" in words
    with pytest.raises(QuickmergeError, match="not all zero"):
        bars_svg({"a": 0.0}, {"a": 0.0})
    with pytest.raises(QuickmergeError, match="not negative"):
        bars_svg({"a": 1.0}, {"a": -1.0})


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    matplotlib.rcParams["svg.fonttype"] = "path"
    before = dict(matplotlib.rcParams)
    pareto_svg(rows())
    assert dict(matplotlib.rcParams) == before


def test_importing_reports_loads_nothing_heavy() -> None:
    code = (
        "import sys, quickmerge.viz.tokenmap, quickmerge.viz.page, quickmerge.bench.table\n"
        "print([name for name in ('matplotlib', 'rich', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
