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


def test_the_layout_names_every_package() -> None:
    layout = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Layout")[1]
    packages = {path.parent.name for path in (ROOT / "src" / "quickmerge").glob("*/__init__.py")}
    named = {line.split("`")[1].rstrip("/") for line in layout.splitlines() if line.startswith("| `")}
    assert named == packages
