"""Seconds of prefill and of a token against the length of the prompt: docs/images/curves.png.

python benchmarks/curve_figure.py [--results benchmarks/results/curves.json] [--out docs/images/curves.png]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from quickmerge.viz.drawing import LIGHT, OTHERS, bare_axes, new_figure, note, note_ends, plain_settings, save

HERE = Path(__file__).parent
WAYS = ("plain", "merge", "Multipole", "merge, Multipole", "lookup", "merge, Multipole, lookup")
"""What is drawn, in the order of colours; the rest stands in the tables."""
SHORT = {"merge, Multipole": "both", "merge, Multipole, lookup": "all three"}
TITLES = {"smollm2": "SmolLM2-135M", "llama-8b": "the heads of an 8B"}
WORDS = {"prefill_seconds": ("prefill, s", 1.0), "step_seconds": ("a token, ms", 1e3)}


def main() -> int:
    """Draw it anew from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "curves.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images" / "curves.png")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text(encoding="utf-8"))["rows"], args.out)
    return 0


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """A row of two panels for each shape: prefill, and each token after it; both axes logarithmic."""
    shapes = [shape for shape in TITLES if any(row["shape"] == shape for row in rows)]
    colours = (LIGHT.faint, LIGHT.accent, *(pair[0] for pair in OTHERS))
    with plain_settings(text_as_paths=True):
        figure = new_figure(10.2, 3.9 * len(shapes))
        figure.set_facecolor(LIGHT.card)
        tall = 1 / len(shapes)
        for down, shape in enumerate(shapes):
            bottom = 1 - tall * (down + 1)
            for left, (key, (words, scale)) in zip((0.065, 0.555), WORDS.items(), strict=True):
                axes = figure.add_axes((left, bottom + 0.16 * tall, 0.29, 0.66 * tall))
                bare_axes(axes, LIGHT)
                axes.set_xscale("log", base=2)
                axes.set_yscale("log")
                top: dict[str, Any] = {"xycoords": "axes fraction"}
                note(axes, f"{TITLES[shape]}: {words}", (0, 1), (0, 8), color=LIGHT.ink, fontsize=12, **top)
                ends = []
                for way, colour in zip(WAYS, colours, strict=False):
                    line = [row for row in rows if (row["shape"], row["way"], row["batch"]) == (shape, way, 1)]
                    line.sort(key=lambda row: row["tokens"])
                    if line:
                        at, value = [row["tokens"] for row in line], [scale * row[key] for row in line]
                        axes.plot(at, value, color=colour, linewidth=2, marker="o", markersize=5)
                        ends.append((SHORT.get(way, way), (at[-1], value[-1]), colour))
                axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / 1024:g}K"))
                axes.xaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_minor_locator(NullLocator())
                axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axes.set_xlabel("tokens of the prompt")
                axes.set_ylim(*axes.get_ylim())  # settled, so that places can be told
                note_ends(axes, ends, (8, 0))
        save(figure, out)


if __name__ == "__main__":
    sys.exit(main())
