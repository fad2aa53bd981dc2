"""What every benchmark command ends with: JSON where it is wanted, tables, and a page where it is wanted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickmerge.bench.harness import Result
from quickmerge.bench.report import Report
from quickmerge.console.options import write_json
from quickmerge.errors import clean_name
from quickmerge.terminal import Terminal

__all__ = ["PAGE", "show_result"]

PAGE = "report.html"


def show_result(
    found: Result, report: Report, *, out: Path | None, json: Path | None, records: str, **more: Any
) -> None:
    """Print a result, and write it where that is wanted.

    Args:
        found: what was measured.
        report: the same for readers.
        out: the folder of the page.
        json: the file.
        records: what records are called there.
        more: further lists of it.
    """
    write_json(json, found.as_dict(records, **more))
    report.print(Terminal())
    if out is not None:
        print(f"wrote {clean_name(report.write(out / PAGE))}")
