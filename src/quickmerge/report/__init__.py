"""Reports: maps of tokens and patches, figures, and self-contained pages that show what reading fewer tokens cost.

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
    from quickmerge.report.patchmap_animation import video_animation
    from quickmerge.report.patchmap_files import write_picture
    from quickmerge.report.patchmap_paint import group_colours
    from quickmerge.report.patchmap_picture import merged_picture
    from quickmerge.report.patchmap_stage import PatchStage
    from quickmerge.report.patchmap_video import video_strip
    from quickmerge.report.tokenmap_figure import token_map_figure
    from quickmerge.report.tokenmap_html import token_map_html
    from quickmerge.report.tokenmap_text import token_map_text

__all__ = [
    "PatchStage",
    "TokenCell",
    "bars_svg",
    "bench_report",
    "bench_table",
    "demo_report",
    "group_colours",
    "layers_svg",
    "merged_picture",
    "pareto_png",
    "pareto_svg",
    "token_map_figure",
    "token_map_html",
    "token_map_text",
    "video_animation",
    "video_strip",
    "write_page",
    "write_picture",
]

_HOMES = {
    "PatchStage": "patchmap_stage",
    "TokenCell": "cells",
    "bars_svg": "charts",
    "bench_report": "bench",
    "bench_table": "bench",
    "demo_report": "demo",
    "group_colours": "patchmap_paint",
    "layers_svg": "charts",
    "merged_picture": "patchmap_picture",
    "pareto_png": "pareto",
    "pareto_svg": "pareto",
    "token_map_figure": "tokenmap_figure",
    "token_map_html": "tokenmap_html",
    "token_map_text": "tokenmap_text",
    "video_animation": "patchmap_animation",
    "video_strip": "patchmap_video",
    "write_page": "page",
    "write_picture": "patchmap_files",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
