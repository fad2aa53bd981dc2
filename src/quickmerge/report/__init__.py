"""Reports: the token map, the figures, and self-contained pages that show what reading fewer tokens cost.

Names are loaded when they are first used: nothing here imports matplotlib or rich before something is drawn.
The builder of any page, and its blocks, are in :mod:`quickmerge.report.page`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quickmerge.report.bench import bench_report, bench_table
    from quickmerge.report.cells import TokenCell
    from quickmerge.report.charts import bars_svg, layers_svg
    from quickmerge.report.demo import demo_report
    from quickmerge.report.page import write_page
    from quickmerge.report.pareto import pareto_png, pareto_svg
    from quickmerge.report.tokenmap_figure import token_map_figure
    from quickmerge.report.tokenmap_html import token_map_html
    from quickmerge.report.tokenmap_text import token_map_text

__all__ = [
    "TokenCell",
    "bars_svg",
    "bench_report",
    "bench_table",
    "demo_report",
    "layers_svg",
    "pareto_png",
    "pareto_svg",
    "token_map_figure",
    "token_map_html",
    "token_map_text",
    "write_page",
]

_HOMES = {
    "TokenCell": "cells",
    "bars_svg": "charts",
    "bench_report": "bench",
    "bench_table": "bench",
    "demo_report": "demo",
    "layers_svg": "charts",
    "pareto_png": "pareto",
    "pareto_svg": "pareto",
    "token_map_figure": "tokenmap_figure",
    "token_map_html": "tokenmap_html",
    "token_map_text": "tokenmap_text",
    "write_page": "page",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
