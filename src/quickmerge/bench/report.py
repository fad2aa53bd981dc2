"""The page of a benchmark: what it comes to in a sentence, charts, tables, how it was measured, and with what."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

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
    """

    title: str
    table: Table | None = None
    caption: str = ""
    charts: Sequence[tuple[Markup, str]] = ()


@dataclass(frozen=True)
class Report:
    """A page.

    Attributes:
        title: in the window and as the heading.
        sections: from the top.
        notes: sentences on how it was measured.
        meta: what was measured with which settings, listed as it comes.
        verdict: what it comes to, in a sentence.
        subtitle: a line under the title.
    """

    title: str
    sections: Sequence[Section]
    notes: Sequence[str] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    verdict: str = ""
    subtitle: str = ""

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
