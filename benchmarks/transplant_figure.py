"""Bits per byte while shared tokens are hidden: docs/images/transplant_hidden.png.

    python benchmarks/transplant_figure.py [--results benchmarks/results/transplant.json] [--out FILE.png]

The shares are of the tokens that the base and the new vocabulary have in common.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quickmerge.viz.drawing import LIGHT, OTHERS, bare_axes, new_figure, note, note_ends, plain_settings, save

HERE = Path(__file__).parent


def main() -> int:
    """Draw it anew from the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results" / "transplant.json")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "images" / "transplant_hidden.png")
    args = parser.parse_args()
    draw(json.loads(args.results.read_text(encoding="utf-8"))["hidden"], args.out)
    return 0


def draw(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """One line a method."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(str(row["method"]), []).append(row)
    with plain_settings(text_as_paths=True):
        figure = new_figure(7.6, 4.6)
        figure.set_facecolor(LIGHT.card)
        axes = figure.add_axes((0.09, 0.14, 0.70, 0.68))
        bare_axes(axes, LIGHT)
        top: dict[str, Any] = {"xycoords": "axes fraction"}
        title: dict[str, Any] = {"color": LIGHT.ink, "fontsize": 13, "fontweight": "bold"}
        note(axes, "Tokens hidden from the base", (0, 1), (0, 26), **title, **top)
        note(axes, "bits per byte of prose, 95 % intervals", (0, 1), (0, 9), color=LIGHT.muted, fontsize=10, **top)
        colours = (LIGHT.faint, *(pair[0] for pair in OTHERS), LIGHT.accent)
        shades = {name: colours[order % len(colours)] for order, name in enumerate(lines)}
        for name, line in lines.items():
            at, value = [100 * r["share"] for r in line], [r["bits_per_byte"] for r in line]
            spread = [[abs(r[f"bits_per_byte_{end}"] - r["bits_per_byte"]) for r in line] for end in ("low", "high")]
            axes.errorbar(at, value, spread, color=shades[name], linewidth=2.2, marker="o", markersize=6, capsize=3)
        axes.set_xlabel("% of the shared tokens that are hidden, and made like new ones")
        axes.set_ylim(axes.get_ylim())  # settled, so that places can be told
        ends = [(name, line[-1]) for name, line in lines.items()]
        note_ends(axes, [(n, (100 * end["share"], end["bits_per_byte"]), shades[n]) for n, end in ends], (9, -4))
        save(figure, out)


if __name__ == "__main__":
    sys.exit(main())
