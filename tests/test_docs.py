"""Every number in README and docs stands in a committed result file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_those_of_the_results() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_results_name_versions_and_hardware_and_no_machine_path() -> None:
    import json

    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text(encoding="utf-8")
        data = json.loads(text)
        environment = data.get("environment") or data["meta"]["environment"]
        assert environment["torch"] and environment["transformers"] and environment["cpu"]
        assert "/tmp/" not in text and "/home/" not in text and "/root/" not in text


def test_the_map_names_every_folder() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## The map of the house")[1].split("\n## ")[0]
    folders = {path.parent.name for path in (ROOT / "src" / "quickmerge").glob("*/__init__.py")}
    first = " ".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    assert {name.rstrip("/") for name in first.split("`")[1::2]} == folders


def test_changelog_and_citation_tell_the_version() -> None:
    import quickmerge as qm

    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    newest = changes.split("\n## ")[1].split("\n")[0]
    assert newest.split(" ")[0] == qm.__version__ and f"\nversion: {qm.__version__}\n" in citation
    assert newest.split("(")[1].rstrip(")") in (citation.split('date-released: "')[1].split('"')[0], "unreleased")
