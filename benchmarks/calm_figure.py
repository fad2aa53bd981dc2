"""BrierLM against the FLOPs of training, of CALMs and ordinary language models: docs/images/calm.png.

    python benchmarks/calm_figure.py [--results benchmarks/results/calm.json] [--out docs/images/calm.png]

Runs that were ended earlier (``k4@25``) are on a line with the whole one (``k4``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import LogLocator, NullLocator

from quickmerge.viz.drawing import LIGHT, OTHERS, bare_axes, new_figure, note, note_ends, plain_settings, save

HERE = Path(__file__).parent


def main() -> int:
    """Draw it anew from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "calm.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images" / "calm.png")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text(encoding="utf-8"))["rows"], args.out)
    return 0


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Left, quality against the FLOPs of training; right, against those of writing a token."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(str(row["method"]).partition("@")[0], []).append(row)
    with plain_settings(text_as_paths=True):
        figure = new_figure(10.2, 4.3)
        figure.set_facecolor(LIGHT.card)
        left, right = figure.add_axes((0.065, 0.15, 0.40, 0.66)), figure.add_axes((0.575, 0.15, 0.40, 0.66))
        for axes, title, key, words in (
            (left, "What training buys", "train_flops", "FLOPs of the whole training, its autoencoder's inside"),
            (right, "What a token costs", "flops", "FLOPs of writing a token"),
        ):
            bare_axes(axes, LIGHT)
            top: dict[str, Any] = {"xycoords": "axes fraction"}
            note(axes, title, (0, 1), (0, 24), color=LIGHT.ink, fontsize=13, fontweight="bold", **top)
            note(axes, "BrierLM, 95 % intervals", (0, 1), (0, 7), color=LIGHT.muted, fontsize=10, **top)
            ends: list[tuple[str, tuple[float, float], str]] = []
            for order, (name, line) in enumerate(lines.items()):
                ordinary = line[0]["kind"] == "tokens"
                colour = LIGHT.faint if ordinary else (LIGHT.accent, *(pair[0] for pair in OTHERS))[order % 6]
                shown = sorted(line, key=lambda r: r["train_flops"])
                shown = shown if key == "train_flops" else shown[-1:]
                at, value = [r[key] for r in shown], [r["brier_lm"] for r in shown]
                spread = [[abs(r[f"brier_lm_{end}"] - r["brier_lm"]) for r in shown] for end in ("low", "high")]
                axes.errorbar(at, value, spread, color=colour, linewidth=2.2, marker="o", markersize=6, capsize=3)
                ends.append((name, (at[-1], value[-1]), colour))
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(lambda value, _: _short(value))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xlabel(words)
            axes.margins(x=0.18)
            axes.set_ylim(0, axes.get_ylim()[1])  # settled, so that places can be told
            for column in [ends] if key == "train_flops" else [[end] for end in ends]:
                note_ends(axes, column, (8, 6))
        save(figure, out)


def _short(value: float) -> str:
    """``5e12`` as ``5 T``."""
    for unit, name in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


if __name__ == "__main__":
    sys.exit(main())
