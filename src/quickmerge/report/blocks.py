"""The building blocks of a report page.

Every argument is text and is escaped, with two exceptions that take markup: the drawing in :func:`figure` and the
body in :func:`details`. Give those nothing that this package did not make.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from quickmerge.errors import QuickmergeError
from quickmerge.report.text import clean, escape, escape_name

_DENSE = 8  # a table with more columns than this is set smaller
_WRAP_OVER = 36  # a cell with more characters than this may break into lines


def heading(text: str, level: int = 2) -> str:
    """Return a heading of ``level`` 2 or 3; the page's title is level 1."""
    if level not in (2, 3):
        raise QuickmergeError(f"A heading on a report page has level 2 or 3, not {level!r}.")
    return f"<h{level}>{escape_name(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Return a paragraph."""
    return f"<p>{escape(text)}</p>"


def lead(text: str) -> str:
    """Return the opening sentence of a report, set larger."""
    return f'<p class="lead">{escape(text)}</p>'


def table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    align: str | None = None,
    caption: str = "",
    *,
    strong: Collection[int] = (),
    ruled: Collection[int] = (),
) -> str:
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
    head = "".join(f'<th scope="col" class="{a}">{escape_name(h)}</th>' for h, a in zip(headers, letters, strict=True))
    body = "".join(
        f"<tr{_row_class(order in strong, order in ruled)}>{_cells(row, letters)}</tr>"
        for order, row in enumerate(rows)
    )
    dense = ' class="dense"' if columns > _DENSE else ""
    below = f"<caption>{escape_name(caption)}</caption>" if caption else ""
    return (
        f'<div class="tablebox" tabindex="0"><table{dense}>{below}<thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row_class(strong: bool, ruled: bool) -> str:
    names = " ".join(name for name, wanted in (("strong", strong), ("ruled", ruled)) if wanted)
    return f' class="{names}"' if names else ""


def _cells(row: Sequence[object], letters: str) -> str:
    parts = []
    for column, (value, letter) in enumerate(zip(row, letters, strict=True)):
        classes = letter + (" wrap" if len(clean(value)) > _WRAP_OVER else "")
        tag, scope = ("td", "") if column else ("th", ' scope="row"')
        parts.append(f'<{tag}{scope} class="{classes}">{escape_name(value)}</{tag}>')
    return "".join(parts)


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Return a row of cards, each a label, a large value and a note."""
    made = "".join(
        f'<li><span class="label">{escape_name(label)}</span><span class="value">{escape_name(value)}</span>'
        f'<span class="note">{escape_name(note)}</span></li>'
        for label, value, note in items
    )
    return f'<ul class="cards">{made}</ul>'


def columns(left_title: str, left_text: str, right_title: str, right_text: str) -> str:
    """Return two texts side by side, below each other on a narrow screen, their line breaks kept."""
    sides = "".join(
        f'<section><h3>{escape_name(title)}</h3><p class="said" dir="auto">{escape(text)}</p></section>'
        for title, text in ((left_title, left_text), (right_title, right_text))
    )
    return f'<div class="sides">{sides}</div>'


def figure(svg: str, caption: str) -> str:
    """Return a drawing of this package (``svg`` is markup and is not escaped) with a caption."""
    below = f'<figcaption class="cap">{escape_name(caption)}</figcaption>' if caption else ""
    return f'<figure class="shot"><div class="scroll" tabindex="0">{svg}</div>{below}</figure>'


def details(summary: str, body: str) -> str:
    """Return ``body`` (blocks of this module; it is markup and is not escaped) folded away under ``summary``."""
    return f'<details class="fold"><summary>{escape_name(summary)}</summary>{body}</details>'
