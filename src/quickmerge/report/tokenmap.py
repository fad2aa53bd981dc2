"""The token map: a document as it reads, showing which tokens were kept, merged or dropped.

Three forms of the same map: :func:`token_map_html` for a page, :func:`token_map_figure` for a README or a
paper, :func:`token_map_text` for the terminal.
"""

from __future__ import annotations

from quickmerge.report.cells import TokenCell
from quickmerge.report.tokenmap_figure import token_map_figure
from quickmerge.report.tokenmap_html import token_map_html
from quickmerge.report.tokenmap_text import token_map_text

__all__ = ["TokenCell", "token_map_figure", "token_map_html", "token_map_text"]
