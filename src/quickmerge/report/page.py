"""One self-contained HTML page: no request leaves it, and nothing in it runs that was not written here."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from quickmerge.report.blocks import cards, columns, details, figure, heading, lead, paragraph, table
from quickmerge.report.files import write_atomically
from quickmerge.report.page_style import PAGE_CSS, mark
from quickmerge.report.text import escape_name
from quickmerge.report.tokenmap_style import TOKEN_MAP_CSS, TOKEN_MAP_JS

__all__ = [
    "cards",
    "columns",
    "details",
    "figure",
    "heading",
    "lead",
    "page",
    "paragraph",
    "table",
    "write_page",
]


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
