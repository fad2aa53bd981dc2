"""The notebooks: they run, what they show is small and of nobody's machine, and the site names them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST = 200 * 1024
"""Bytes of an image."""


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def source(cell: Any) -> str:
    return "".join(cell["source"])


def named(path: Path) -> str:
    return path.stem


def test_the_site_names_every_notebook() -> None:
    page = (ROOT / "docs/get-started/notebooks.md").read_text(encoding="utf-8")
    assert set(re.findall(r"notebooks/([\w-]+)\.ipynb", page)) == {path.stem for path in NOTEBOOKS}
    assert len(NOTEBOOKS) == 6


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_it_begins_with_an_aim_and_ends_with_limits(path: Path) -> None:
    cells = read(path)["cells"]
    assert source(cells[0]).startswith("# ") and "**Aim.**" in source(cells[0])
    assert "## Limits" in source(cells[-1])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_it_was_run_and_shows_little(path: Path) -> None:
    code = [cell for cell in read(path)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "make notebooks runs it"
    outputs = [out for cell in code for out in cell["outputs"]]
    shown = [kind for out in outputs for kind in out.get("data", {})]
    assert "text/markdown" in shown or "image/png" in shown, "a table or a picture"
    for out in outputs:
        assert out["output_type"] != "error" and out.get("name") != "stderr"
        assert len(out.get("data", {}).get("image/png", "")) * 3 // 4 <= MOST
        written = json.dumps(out.get("text", "")) + json.dumps(out.get("data", {}).get("text/markdown", ""))
        assert not re.search(r"/(tmp|root|home|work)/", written), written


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_its_links_to_the_site_lead_to_pages(path: Path) -> None:
    for cell in read(path)["cells"]:
        for page in re.findall(r"quickmerge\.github\.io/quickmerge/([\w/-]+)\.html", source(cell)):
            assert (ROOT / "docs" / f"{page}.md").is_file(), page
        for other in re.findall(r"\]\(([\w-]+\.ipynb)\)", source(cell)):
            assert (path.parent / other).is_file(), other


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_it_runs(path: Path, tmp_path: Path) -> None:
    """As nbmake runs it, from its first cell to its last, in a folder of its own."""
    shutil.copy(path, tmp_path)
    search = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, "--nbmake",
         "--nbmake-timeout", "1200", path.name],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": search}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
