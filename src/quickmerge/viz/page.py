"""The building blocks of a report page.

Every argument is text and is escaped, with two exceptions that take markup: the drawing in :func:`figure` and the
body in :func:`details`. Give those nothing that this package did not make.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.viz.charts import role_variables
from quickmerge.viz.drawing import DARK, LIGHT, SLOT_COLORS, Theme, write_atomically
from quickmerge.viz.format import clean, escape, escape_name, number
from quickmerge.viz.tokenmap import TOKEN_MAP_CSS, TOKEN_MAP_JS, TokenCell

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


# The style of a report page, as a constant that its own security policy allows by hash.


def _variables(theme: Theme) -> str:
    colors = "".join(f"--{field.name}:{getattr(theme, field.name)};" for field in fields(theme))
    return colors + role_variables(theme is DARK)


PAGE_CSS = (
    f":root{{color-scheme:light dark;{_variables(LIGHT)}}}"
    f"@media screen and (prefers-color-scheme:dark){{:root{{{_variables(DARK)}}}}}"
    """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);
font:1rem/1.6 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:62rem;margin:0 auto;padding:clamp(1.25rem,4vw,3rem) clamp(1rem,4vw,2rem) 4rem}
header{margin-bottom:1.75rem}
.brand{display:flex;align-items:center;gap:.6rem;font-weight:650;font-size:.9rem;color:var(--muted);margin:0 0 1.5rem}
.brand svg{width:52px;height:14px;flex:none}
h1{font-size:clamp(1.6rem,4.6vw,2.35rem);line-height:1.15;letter-spacing:-.022em;font-weight:750;margin:0;
text-wrap:balance;overflow-wrap:anywhere}
header .sub{color:var(--muted);margin:.6rem 0 0;overflow-wrap:anywhere}
h2{font-size:1.3rem;line-height:1.25;letter-spacing:-.012em;margin:3rem 0 .6rem;overflow-wrap:anywhere}
h3{font-size:1.02rem;margin:1.75rem 0 .4rem;overflow-wrap:anywhere}
p{margin:.5rem 0 1rem;max-width:70ch;overflow-wrap:anywhere}
.lead{font-size:clamp(1.12rem,2.6vw,1.38rem);line-height:1.45;max-width:46em;margin:0 0 1.75rem;text-wrap:pretty}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(9.75rem,100%),1fr));gap:.85rem;margin:0 0 1rem;
padding:0;list-style:none}
.cards li{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1rem 1.15rem}
.cards .label{display:block;color:var(--muted);font-size:.85rem;line-height:1.4}
.cards .value{display:block;font-size:1.8rem;font-weight:720;letter-spacing:-.025em;line-height:1.25;
font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
.cards .note{color:var(--muted);font-size:.85rem;line-height:1.4;display:block}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr));gap:.85rem;margin:1rem 0}
.sides section{background:var(--card);border:1px solid var(--line);border-radius:14px;padding:1rem 1.25rem}
.sides section+section{border-color:var(--accent)}
.sides h3{margin:0 0 .5rem;font-size:.9rem;color:var(--muted);font-weight:600}
.sides section+section h3{color:var(--accent)}
.sides .said{white-space:pre-wrap;overflow-wrap:anywhere;margin:0;unicode-bidi:isolate}
figure.shot{margin:1rem 0 1.5rem;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:1rem clamp(.75rem,2.5vw,1.25rem)}
.scroll{overflow-x:auto}
.qm-chart{display:block;width:100%;min-width:19rem;height:auto;max-width:54rem;margin:0}
figcaption.cap{color:var(--muted);font-size:.88rem;line-height:1.5;margin-top:.75rem;max-width:75ch}
.tablebox{overflow-x:auto;margin:1rem 0 1.5rem;background:var(--card);border:1px solid var(--line);border-radius:14px;
padding:.35rem 0}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{caption-side:bottom;text-align:left;color:var(--muted);font-size:.85rem;line-height:1.5;
padding:.7rem 1.15rem .55rem}
th,td{padding:.5rem .75rem;border-bottom:1px solid var(--line);white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{padding-left:1.15rem}th:last-child,td:last-child{padding-right:1.15rem}
thead th{color:var(--muted);font-weight:600;font-size:.82rem}
tbody tr:last-child>*{border-bottom:0}
tbody th{font-weight:500}
td.wrap,th.wrap{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.l{text-align:left}.r{text-align:right}.c{text-align:center}
table.dense{font-size:.83rem}table.dense th,table.dense td{padding-left:.5rem;padding-right:.5rem}
table.dense :is(th,td):first-child{padding-left:1.15rem}table.dense :is(th,td):last-child{padding-right:1.15rem}
tr.ruled:not(:first-child)>*{border-top:2px solid var(--faint)}
tr.strong>*{font-weight:650}tr.strong>:first-child{color:var(--accent)}
details.fold{margin:1rem 0;border-top:1px solid var(--line);padding-top:.75rem}
details.fold summary{cursor:pointer;font-weight:600;color:var(--accent)}
summary:focus-visible,.scroll:focus-visible,.tablebox:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
.qm-map{margin:1rem 0!important}
table:not(.dense) tbody th{white-space:normal;min-width:8.5rem}
:is(thead,tbody) tr>:first-child{position:sticky;left:0;background:var(--card)}
@media (max-width:40rem){
table,table.dense{font-size:.82rem}th,td{padding:.45rem .45rem}
.cards li{padding:.85rem .95rem}.cards .value{font-size:1.55rem}}
@media print{body{background:none;font-size:10.5pt}main{max-width:none;padding:0}
.cards li,.sides section,figure.shot,tr{break-inside:avoid}h2,h3{break-after:avoid}
.qm-chart{min-width:0}.scroll,.tablebox{overflow:visible}th,td{white-space:normal}}
"""
)


def mark() -> str:
    """Return the sign of the project: tokens going into two slots."""
    blue, orange = SLOT_COLORS[0], SLOT_COLORS[1]
    chips = ((0, 8, blue, 0.35), (9, 10, blue, 0.35), (20, 12, blue, 1), (33, 6, orange, 0.4), (40, 12, orange, 1))
    drawn = "".join(
        f'<rect x="{x}" y="0" width="{width}" height="14" rx="3" fill="{color}" fill-opacity="{alpha}"/>'
        for x, width, color, alpha in chips
    )
    return f'<svg viewBox="0 0 52 14" aria-hidden="true">{drawn}</svg>'


# One self-contained HTML page: no request leaves it, and nothing in it runs that was not written here.


def page(title: str, blocks: Sequence[str], *, subtitle: str = "") -> str:
    """Return a whole HTML document made of ``blocks`` (markup from the helpers of this module).

    The page loads nothing. Its policy allows by hash exactly the styles and the one script of this package, so even
    markup that slipped through escaping could neither run nor fetch anything.

    Args:
        title: The title, in the window and as the heading.
        blocks: The blocks, top to bottom.
        subtitle: A line under the title.
    """
    below = f'<p class="sub">{escape_name(subtitle)}</p>' if subtitle else ""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy()}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="referrer" content="no-referrer"><meta name="generator" content="quickmerge">'
        # Without this, browsers ask the server for /favicon.ico.
        '<link rel="icon" href="data:,">'
        f"<title>{escape_name(title)}</title><style>{PAGE_CSS}</style></head>\n"
        f'<body><main><header><p class="brand">{mark()}quickmerge</p><h1>{escape_name(title)}</h1>{below}</header>\n'
        + "\n".join(blocks)
        + "\n</main></body></html>\n"
    )


def write_page(path: str | os.PathLike[str], html: str) -> Path:
    """Write ``html`` to ``path`` whole or not at all, creating the folders on the way.

    Raises:
        QuickmergeError: the folder or the file cannot be written.
    """
    return write_atomically(path, html.encode("utf-8", "replace"))


def _policy() -> str:
    styles = " ".join(_allowed(text) for text in (PAGE_CSS, TOKEN_MAP_CSS))
    return (
        f"default-src 'none'; style-src {styles}; script-src {_allowed(TOKEN_MAP_JS)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _allowed(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"
