from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from report_samples import Parsed, drawings, rows

from quickmerge.bench.pareto import pareto_chart, pareto_png
from quickmerge.errors import QuickmergeError
from quickmerge.viz.charts import bars_chart, layers_chart
from quickmerge.viz.drawing import DARK, LIGHT

DRAWINGS: dict[str, Callable[[], str]] = {
    "pareto": lambda: pareto_chart(rows()),
    "pareto_seconds": lambda: pareto_chart(rows(), x="prefill_seconds"),
    "pareto_cache": lambda: pareto_chart(rows(), x="cache_ratio"),
    "pareto_nll": lambda: pareto_chart(rows(), y="nll"),
    "layers": lambda: layers_chart([2300] * 6 + [575] * 18, 2300),
    "bars": lambda: bars_chart({"reading": 1.8, "answering": 2.4}, {"reading": 0.6, "answering": 2.2}),
}


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_chart_is_stable_has_a_drawing_for_each_scheme_and_says_what_it_is(name: str) -> None:
    picture = DRAWINGS[name]()
    assert picture == DRAWINGS[name]()
    parsed = Parsed(picture)
    assert parsed.tags == ["picture", "source", "img"] and not parsed.open
    found = {attribute: value for _, attribute, value in parsed.attributes}
    assert found["alt"] and found["media"] == "screen and (prefers-color-scheme: dark)"
    dark, light = drawings(picture)
    assert found["srcset"].startswith("data:image/svg+xml;base64,") and found["srcset"] != found["src"]
    for svg, theme, other in ((light, LIGHT, DARK), (dark, DARK, LIGHT)):
        assert theme.accent in svg and theme.muted in svg and other.accent not in svg and other.muted not in svg
        assert "dc:date" not in svg and "system-ui" in svg
        # where it is shown as an image, a drawing can load nothing and run nothing; it does not ask to either
        root = ET.fromstring(svg)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "image", "foreignObject"))]
        links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(link.startswith("#") for link in links)
    assert words_of(picture) == [e.text or "" for e in ET.fromstring(dark).iter() if e.tag.endswith("}text")]


def words_of(picture: str) -> list[str]:
    """The words of the light drawing."""
    light = drawings(picture)[1]
    return [element.text or "" for element in ET.fromstring(light).iter() if element.tag.endswith("}text")]


def test_every_reducer_is_named_and_the_full_prompt_marked() -> None:
    words = words_of(pareto_chart(rows()))
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
    words = words_of(pareto_chart(many))
    assert all(str(row["reducer"]) in words for row in many)


def test_a_hopeless_reducer_does_not_squash_the_others() -> None:
    worst = [row | {"recovery": -40.0, "recovery_low": -41.0, "recovery_high": -39.0} for row in rows()[-3:]]
    assert "off the scale: truncate" in words_of(pareto_chart([*rows()[:-3], *worst]))


def test_gaps_and_missing_intervals_are_fine() -> None:
    holey = [row | {"recovery_low": None, "recovery_high": float("nan")} for row in rows()]
    holey[0]["recovery"] = None
    del holey[1]["flops_ratio"]
    pareto_chart(holey)
    with pytest.raises(QuickmergeError, match="nothing to draw"):
        pareto_chart([row | {"recovery": None} for row in rows()])
    with pytest.raises(QuickmergeError, match="nothing to draw"):
        pareto_chart([])
    with pytest.raises(QuickmergeError, match="Cannot draw against"):
        pareto_chart(rows(), x="colour")  # type: ignore[arg-type]
    with pytest.raises(QuickmergeError, match="needs a number"):
        pareto_chart([rows()[0] | {"recovery": "high"}])
    with pytest.raises(QuickmergeError, match="name of its reducer"):
        pareto_chart([{"keep": 0.5}])


def test_names_are_not_mathematics_and_not_markup() -> None:
    odd = [row | {"reducer": "$\\frac{1}$ <b>&\x00\ud800"} for row in rows()]
    assert "$\\frac{1}$ <b>&␀\ufffd" in words_of(pareto_chart(odd))


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_file_is_the_same_every_time(tmp_path: Path, suffix: str) -> None:
    for name in ("one", "two"):
        pareto_png(tmp_path / "new" / f"{name}.{suffix}", rows(), dark=name == "dark")
    one, two = ((tmp_path / "new" / f"{name}.{suffix}").read_bytes() for name in ("one", "two"))
    assert one == two
    with pytest.raises(QuickmergeError, match=r"\.png or \.svg"):
        pareto_png(tmp_path / "x.pdf", rows())


def test_layers_names_only_the_steps_that_matter() -> None:
    assert "575 tokens" in words_of(layers_chart([2300, 575, 575], 2300))
    gradual = [2300 - 10 * layer for layer in range(24)]
    assert not [word for word in words_of(layers_chart(gradual, 2300)) if word.endswith(" tokens")]
    with pytest.raises(QuickmergeError, match="at least one layer"):
        layers_chart([], 10)


def test_bars_add_up() -> None:
    words = words_of(bars_chart({"a": 1.0, "b": 2.0}, {"a": 0.5}, before_label="then", after_label="now"))
    assert "3.00\u00a0s" in words and "0.50\u00a0s" in words and "then" in words and "now" in words
    with pytest.raises(QuickmergeError, match="not all zero"):
        bars_chart({"a": 0.0}, {"a": 0.0})
    with pytest.raises(QuickmergeError, match="not negative"):
        bars_chart({"a": 1.0}, {"a": -1.0})


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib

    matplotlib.rcParams["svg.fonttype"] = "path"
    before = dict(matplotlib.rcParams)
    pareto_chart(rows())
    assert dict(matplotlib.rcParams) == before


def test_importing_reports_loads_nothing_heavy() -> None:
    code = (
        "import sys, quickmerge.viz.tokenmap, quickmerge.viz.page, quickmerge.bench.report\n"
        "print([name for name in ('matplotlib', 'numpy', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
