"""The building blocks of a report page, and the page that they make.

Every argument is text and is escaped by the templates, with two exceptions that take markup: the drawing of `figure`
and the body of `details`. Give those nothing that this package did not make.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from markupsafe import Markup

from quickmerge.errors import QuickmergeError
from quickmerge.viz.drawing import write_atomically
from quickmerge.viz.format import clean, number
from quickmerge.viz.render import macro, render
from quickmerge.viz.tokenmap import TokenCell


def heading(text: str, level: int = 2) -> Markup:
    """Return a heading of ``level`` 2 or 3; the page's title is level 1."""
    if level not in (2, 3):
        raise QuickmergeError(f"A heading on a report page has level 2 or 3, not {level!r}.")
    return macro("heading", text, level)


def paragraph(text: str) -> Markup:
    """Return a paragraph."""
    return macro("paragraph", text)


def lead(text: str) -> Markup:
    """Return the opening sentence of a report, set larger."""
    return macro("lead", text)


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    align: str | None = None,
    caption: str = "",
    *,
    strong: Collection[int] = (),
    ruled: Collection[int] = (),
) -> Markup:
    """Return a table whose first column names the rows; it scrolls sideways by itself on a narrow screen.

    Args:
        headers: The names of the columns.
        rows: The cells, row by row.
        align: One letter for each column: ``l``, ``r`` or ``c``; left and then right where None.
        caption: A sentence under the table.
        strong: The numbers of the rows to stress.
        ruled: The numbers of the rows that begin a new group.
    """
    columns = len(headers)
    letters = align if align is not None else "l" + "r" * (columns - 1)
    if len(letters) != columns or set(letters) - set("lrc"):
        raise QuickmergeError(f"The alignment {letters!r} needs one of l, r, c for each of {columns} columns.")
    uneven = [row for row in rows if len(row) != columns]
    if uneven:
        raise QuickmergeError(f"A row of the table has {len(uneven[0])} cells where there are {columns} columns.")
    return macro("table", headers, rows, letters, caption, strong, ruled)


def cards(items: Sequence[tuple[str, str, str]]) -> Markup:
    """Return a row of cards, each a label, a large value and a note."""
    return macro("cards", items)


def columns(left_title: str, left_text: str, right_title: str, right_text: str) -> Markup:
    """Return two texts side by side, below each other on a narrow screen, their line breaks kept."""
    return macro("columns", ((left_title, left_text), (right_title, right_text)))


def figure(drawing: str, caption: str) -> Markup:
    """Return a drawing of this package (it is markup and is not escaped) with a caption."""
    return macro("figure", Markup(drawing), caption)


def details(summary: str, body: str) -> Markup:
    """Return ``body`` (blocks of this module; it is markup and is not escaped) folded away under ``summary``."""
    return macro("details", summary, Markup(body))


# Read the JSON-like data of a report, and say plainly what is missing from it.


_CELL_FIELDS = tuple(field.name for field in fields(TokenCell))


def part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return the mapping under ``key``."""
    value = data.get(key)
    if not isinstance(value, Mapping):
        raise QuickmergeError(f"The report data needs a mapping under {key!r}.")
    return value


def needed(data: Mapping[str, Any], key: str) -> float:
    """Return the number under ``key``, which the report cannot do without."""
    value = number(data, key)
    if value is None:
        raise QuickmergeError(f"The report data needs a number under {key!r}.")
    return value


def words(data: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """Return the text under ``key``."""
    value = data.get(key, default)
    if value is None:
        raise QuickmergeError(f"The report data needs a text under {key!r}.")
    return clean(value)


def cells_of(data: Mapping[str, Any]) -> list[TokenCell]:
    """Return the token cells under ``cells``, given as cells or as mappings of their fields."""
    cells = []
    for order, item in enumerate(data.get("cells") or ()):
        if isinstance(item, TokenCell):
            cells.append(item)
            continue
        absent = [name for name in _CELL_FIELDS if not isinstance(item, Mapping) or name not in item]
        if absent:
            raise QuickmergeError(f"Token cell {order} of the report data lacks {', '.join(absent)}.")
        cells.append(TokenCell(**{name: item[name] for name in _CELL_FIELDS}))
    return cells


def facts(data: object, prefix: str = "") -> list[tuple[str, str]]:
    """Return ``data`` as named lines: a mapping line by line, nested ones with a path, anything else as one line."""
    if isinstance(data, Mapping):
        lines: list[tuple[str, str]] = []
        for key, value in data.items():
            name = clean(key).replace("_", " ")
            lines += facts(value, f"{prefix} {name}".strip())
        return lines
    if isinstance(data, Sequence) and not isinstance(data, str):
        return [(prefix, ", ".join(clean(item) for item in data))]
    return [(prefix, "–" if data is None else clean(data))]


# One self-contained HTML page: no request leaves it, and nothing in it runs that was not written here.


def page(title: str, blocks: Sequence[str], *, subtitle: str = "") -> Markup:
    """Return a whole HTML document made of ``blocks`` (markup from the helpers of this module).

    Args:
        title: The title, in the window and as the heading.
        blocks: The blocks, top to bottom.
        subtitle: A line under the title.
    """
    return render("page.html", title=title, subtitle=subtitle, blocks_of_page=list(map(Markup, blocks)))


def inset(title: str, block: str) -> Markup:
    """Return a whole HTML document for a frame inside another page: ``block`` (markup of this package) and no header.

    It has the policy of `page`: nothing is fetched, and nothing runs that was not written here.

    Args:
        title: of the document, for who can't see it.
        block: what it shows.
    """
    return render("inset.html", title=title, block=Markup(block))


def write_page(path: str | os.PathLike[str], html: str) -> Path:
    """Write ``html`` to ``path`` whole or not at all, creating the folders on the way.

    Raises:
        QuickmergeError: the folder or the file cannot be written.
    """
    return write_atomically(path, html.encode("utf-8", "replace"))
