"""The figures of the reports: recovery against cost, tokens per layer, and where the seconds go."""

from __future__ import annotations

from quickmerge.report.charts import bars_svg, layers_svg
from quickmerge.report.pareto import pareto_png, pareto_svg
from quickmerge.report.pareto_lines import Cost

__all__ = ["Cost", "bars_svg", "layers_svg", "pareto_png", "pareto_svg"]
