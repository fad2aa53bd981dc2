"""The pages in a real browser: the policy lets their own style and script through, and pointing rings a slot."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_samples import HOSTILE, cells_for, demo, rows

from quickmerge.merge.bench.text import bench_report
from quickmerge.merge.demo import demo_report
from quickmerge.viz.page import write_page
from quickmerge.viz.tokenmap import token_map_html

_BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --dump-dom --virtual-time-budget=3000"
)

pytestmark = pytest.mark.skipif(_BROWSER is None, reason="no chromium found")


def opened(path: Path, folder: Path) -> tuple[str, str]:
    assert _BROWSER is not None
    command = [_BROWSER, *_FLAGS.split(), f"--user-data-dir={folder / 'profile'}", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120, check=True)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


@pytest.mark.parametrize("name", ["demo", "bench"])
def test_reports_open_without_a_complaint(name: str, tmp_path: Path) -> None:
    if name == "demo":
        html = demo_report(demo(question=" ".join(HOSTILE), cells=cells_for([*HOSTILE] * 4)))
    else:
        html = bench_report(rows(kinds=True), {}).html()
    page, console = opened(write_page(tmp_path / f"{name}.html", html), tmp_path)
    assert console == ""
    assert page.count("<picture>") == 2
    # The script takes this attribute away, so its absence shows that the policy let the script run.
    assert name == "bench" or re.search(r'class="qm-read"(?! hidden)', page)


def test_pointing_at_a_token_rings_its_slot(tmp_path: Path) -> None:
    # Here without the policy of a page, because the test has to bring a script of its own.
    point = (
        "document.querySelectorAll('.qm-text .t')[1].dispatchEvent(new PointerEvent('pointerover', {bubbles: true}))"
    )
    fragment = token_map_html(cells_for(["a", "b", "c", "d"]), title="x", caption="")
    path = tmp_path / "map.html"
    path.write_text(f"<!DOCTYPE html><meta charset=utf-8>{fragment}<script>{point}</script>", encoding="utf-8")
    page, console = opened(path, tmp_path)
    assert console == ""
    assert len(re.findall(r'class="t [^"]*\bon"', page)) == 2
    assert "leads slot 1" in page.partition('class="qm-read"')[2]
