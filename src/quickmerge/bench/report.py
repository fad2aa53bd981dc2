"""The report of a benchmark, on a page and in a terminal: charts, tables, how it was measured, and with what."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console

from quickmerge.bench.table import Table
from quickmerge.viz.page import facts, write_page
from quickmerge.viz.render import render

__all__ = ["Report", "Section"]


@dataclass(frozen=True)
class Section:
    """A part of a page under a heading of its own.

    Attributes:
        title: the heading.
        table: what stands below it.
        caption: a sentence under the table.
        charts: drawings above the table, each with its caption; see `quickmerge.viz.charts`.
        printed: whether a terminal shows the table.
    """

    title: str
    table: Table | None = None
    caption: str = ""
    charts: Sequence[tuple[Markup, str]] = ()
    printed: bool = True


@dataclass(frozen=True)
class Report:
    """What a benchmark found, for readers.

    Attributes:
        title: in the window and as the heading.
        sections: from the top.
        notes: sentences on how it was measured.
        meta: what was measured with which settings, listed as it comes.
        verdict: what it comes to, in a sentence.
        subtitle: a line under the title.
        legend: what the short cells of a terminal mean, in a sentence.
    """

    title: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = ""
    subtitle: str = ""
    legend: str = ""

    def print(self, console: Console) -> None:
        """Print the tables, named where there are several, and what their cells mean."""
        sections = [(one, one.table) for one in self.sections if one.printed and one.table is not None]
        for section, table in sections:
            title = section.title if len(sections) > 1 else None
            table.print(console, title=title, caption=section.caption or None)
        if self.legend:
            console.print(self.legend)

    def html(self) -> Markup:
        """The whole document; it loads nothing."""
        return render(
            "report.html", title=self.title, subtitle=self.subtitle, verdict=self.verdict, sections=self.sections,
            notes=self.notes, facts=facts(self.meta),
        )  # fmt: skip

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the document to a file, whole or not at all.

        Raises:
            QuickmergeError: the folder or the file cannot be written.
        """
        return write_page(path, self.html())
