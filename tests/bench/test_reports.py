from __future__ import annotations

import io
import re
from html import unescape

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import Parsed, demo, rows
from rich.console import Console

from quickmerge.bench.rows import bench_verdict, demo_verdict
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.text import bench_report
from quickmerge.merge.demo import demo_report
from quickmerge.viz import format as numbers

SECONDS = st.none() | st.floats(1e-6, 1e4)


def verdict(full: float | None, reduced: float | None, recovery: float | None) -> str:
    return demo_verdict(
        model="m",
        document="d",
        tokens_in=2300,
        tokens_kept=575,
        full_seconds=full,
        reduced_seconds=reduced,
        recovery=recovery,
    ).replace("\u00a0", " ")


def test_verdict_reads_like_a_sentence() -> None:
    assert verdict(1.84, 0.642, 0.8925) == (
        "With 575 of 2,300 tokens kept, m read d 2.9× faster (642 ms instead of 1.84 s), "
        "and 89% of the benefit of reading the document survived."
    )
    assert "10% slower (1.10 s instead of 1.00 s), but only 30%" in verdict(1.0, 1.1, 0.3)
    assert "in about the same time" in verdict(1.0, 1.01, 0.9)
    assert "as well as after reading all of it" in verdict(1.0, 0.5, 1.02)
    assert "no better than without reading it" in verdict(1.0, 0.5, -0.2)
    assert verdict(None, None, None) == "With 575 of 2,300 tokens kept, m read d."


@given(SECONDS, SECONDS, st.none() | st.floats(-5, 5))
def test_verdict_never_claims_more_than_the_numbers(
    full: float | None, reduced: float | None, recovery: float | None
) -> None:
    words = verdict(full, reduced, recovery)
    known = full is not None and reduced is not None
    assert ("faster" not in words) or (known and reduced < full)  # type: ignore[operator]
    assert ("slower" not in words) or (known and reduced > full)  # type: ignore[operator]
    assert words.endswith(".") and "nan" not in words and "None" not in words


def test_bench_verdict_names_who_is_better() -> None:
    assert "the best other reducer, random, recovers less: 55%" in bench_verdict(rows())
    swapped = [row | {"recovery": 0.99} if row["reducer"] == "random" else row for row in rows()]
    assert "random, recovers more: 99%" in bench_verdict(swapped)
    level = [row | {"recovery": 0.9, "recovery_low": 0.8, "recovery_high": 0.95} for row in rows()]
    assert "recovers as much: 90%" in bench_verdict(level) and "(the intervals overlap)" in bench_verdict(level)
    others = [row for row in rows() if row["reducer"] != "quickmerge"]
    assert bench_verdict(others).startswith("With 25% of the tokens kept, random recovers 55%")
    assert "nothing to compare" in bench_verdict([])


def text_of(html: str) -> str:
    bare = re.sub(r"<(style|script)>.*?</\1>", " ", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", bare)))


def test_demo_report_tells_the_run() -> None:
    html = demo_report(demo(method="Each time is a median."))
    words = text_of(html)
    for wanted in (
        "2.9× faster",
        "Question: How far could the fog signal be heard?",
        "Seven miles, in still air.",
        "lower is better",
        "100% is as good as the full document",
        "23.8 MiB",
        "2.4× less",
        "Each time is a median.",
        "Machine: processor some processor; threads 16.",
        "torch",
        "16 tokens → 8 slots",
    ):
        assert wanted in words, wanted
    assert html.index("2.9× faster") < html.index("The answers")
    assert not Parsed(html).open


def test_demo_report_does_not_praise_a_slow_run() -> None:
    slow = demo()
    slow["reduced"] = slow["reduced"] | {"prefill_seconds": 2.5, "ttft_seconds": 2.6, "answer": slow["full"]["answer"]}
    words = text_of(demo_report(slow))
    assert "slower" in words and "faster" not in words and "word for word" in words


def test_demo_report_without_optional_numbers() -> None:
    bare = demo(recovery=None, nll_none=None, flops_ratio=None, cells=[], versions={}, hardware=None)
    for run in ("full", "reduced"):
        bare[run] = {"answer": "x"}
    words = text_of(demo_report(bare))
    assert "None" not in words and "nan" not in words
    assert "hardly helps" in text_of(demo_report(demo(nll_none=2.413)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full": None}, "mapping under 'full'"),
        ({"tokens_in": None}, "number under 'tokens_in'"),
        ({"model": None}, "text under 'model'"),
        ({"cells": [{"text": "x"}]}, "Token cell 0 of the report data lacks slot"),
        ({"layer": "six"}, "number for 'layer'"),
    ],
)
def test_demo_report_says_what_is_missing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(QuickmergeError, match=message):
        demo_report(demo(**changes))


def test_bench_report_has_figures_tables_and_kinds() -> None:
    full = rows()[0] | {"reducer": "full", "keep": 1.0, "recovery": 1.0, "flops_ratio": 1.0}
    html = bench_report([*rows(kinds=True), full], {"model": "some/model", "versions": {"torch": "2.13.0"}}).html()
    words = text_of(html)
    assert html.count("<picture>") == 2
    for wanted in ("Every result", "Recovery by kind of document", "code", "prose", "versions torch", "some/model"):
        assert wanted in words
    assert words.index("full 100%") < words.index("quickmerge 50%")
    with pytest.raises(QuickmergeError, match="at least one row"):
        bench_report([], {})


def test_bench_report_averages_where_there_are_only_kinds() -> None:
    only = [row for row in rows(kinds=True) if "kind" in row]
    assert "means over the kinds" in text_of(bench_report(only, {}).html())


@pytest.mark.parametrize("width", [64, 80, 140])
def test_bench_table_fits_the_terminal(width: int) -> None:
    stream = io.StringIO()
    named = [row | {"reducer": "[red]random"} if row["reducer"] == "random" else row for row in rows()]
    bench_report(named, {}).print(Console(file=stream, width=width))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "[red]random" in stream.getvalue() and ("interval" in stream.getvalue()) == (width > 116)
    first = next(line for line in lines if line.startswith("quickmerge"))
    assert first.split()[:3] == ["quickmerge", "50%", "94%" if width < 116 else "1,024"]
    assert "…" not in stream.getvalue()


def test_numbers_read_well() -> None:
    gap = "\u00a0"
    assert [numbers.seconds(value) for value in (0.0, 3e-6, 0.00421, 0.9999, 1.84, 125.0)] == [
        f"0{gap}µs", f"3.00{gap}µs", f"4.21{gap}ms", f"1.00{gap}s", f"1.84{gap}s", f"125{gap}s",
    ]  # fmt: skip
    assert numbers.seconds(0.62, like=4.2) == f"0.62{gap}s"
    assert [numbers.percent(value) for value in (0.0, 0.004, 0.27, 0.996, 1.0, -0.18)] == [
        "0%", "0.4%", "27%", "99.6%", "100%", "−18%",
    ]  # fmt: skip
    assert [numbers.size(value) for value in (0, 1023, 1024, 54 * 2**20)] == [
        f"0{gap}B", f"1023{gap}B", f"1.00{gap}KiB", f"54.0{gap}MiB",
    ]  # fmt: skip
    assert [numbers.change(2, 1), numbers.change(1, 2), numbers.change(1, 1.01), numbers.change(0, 1)] == [
        "2.0× less", "2.0× more", "the same", "–",
    ]  # fmt: skip
    assert numbers.share(0.125) == "12.5%"
    assert numbers.number({"a": float("inf")}, "a") is None


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e15, max_value=1e15))
def test_numbers_never_fail(value: float) -> None:
    for write in (numbers.seconds, numbers.size, numbers.percent, numbers.times, numbers.count, numbers.loss):
        assert write(value) and "e+" not in write(value)


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        (["a/one.txt", "b/two.txt"], "some/model · a/one.txt, b/two.txt"),
        ([f"{i}.txt" for i in range(36)], "some/model · 36 documents"),
        ("three of a kind", "some/model · three of a kind"),
        (None, "some/model"),
    ],
)
def test_documents_are_named_or_counted_below_the_title(documents: object, words: str) -> None:
    html = bench_report(rows(), {"model": "some/model", "documents": documents}).html()
    assert f">{words}<" in html and "[&" not in html
