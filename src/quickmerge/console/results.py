"""What every benchmark command ends with: JSON where it is wanted, tables, and a page where it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quickmerge.bench.harness import Arm, Result
from quickmerge.bench.report import Report
from quickmerge.console.options import write_json
from quickmerge.console.recording import record_of
from quickmerge.errors import clean_name
from quickmerge.terminal import Terminal

__all__ = ["PAGE", "recorded", "show_result"]

PAGE = "report.html"


def recorded(found: Result, arms: Sequence[Arm], share: str | None = None) -> Result:
    """A result whose rows hold what makes them again.

    Args:
        found: with ``method`` in every row.
        arms: the ways that were compared.
        share: the entry of a row that is its arm's ``keep``; None where names tell all arms apart.
    """
    made = {(arm.name, arm.keep if share else None): arm.ingredients for arm in arms if arm.ingredients}
    for row in found.rows:
        ingredients = made.get((row["method"], row[share] if share else None))
        if ingredients is not None:
            row.update(record_of(ingredients))
    return found


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
