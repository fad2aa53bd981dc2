"""The image of why Gumiho's best heads come first: docs/images/gumiho_theorem.png.

    python benchmarks/gumiho_theorem.py [--out FILE]

No measurement, only the formula: with acceptance probabilities p_1, p_2, ... of the drafted positions, each given that
all before it were accepted, a step accepts E = sum_i p_1 ... p_i drafted tokens on average (theorem 3.1 of arXiv
2503.10135 is about it).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from quickmerge.speculative.tree import expected_accepted
from quickmerge.viz.drawing import LIGHT, OTHERS, bare_axes, new_figure, note, plain_settings, save

OUT = Path(__file__).parent.parent / "docs" / "images" / "gumiho_theorem.png"
EQUAL = (0.8,) * 7
"""Acceptance at seven positions, of which the first two are the serial head's."""
PROFILES = (
    ((0.8, 0.8, 0.8), 2, 0, (-8, 2)),
    ((0.9, 0.6, 0.3), 2, 0, (10, -9)),
    ((0.9, 0.1, 0.9), 1, 0, (10, 2)),
)
"""Acceptance at three positions, from which to which of them some of it is moved, and where its name stands."""


def moved(profile: Sequence[float], source: int, target: int, amount: float) -> list[float]:
    """The profile with ``amount`` of acceptance taken from one position and given to another."""
    out = list(profile)
    out[source] -= amount
    out[target] += amount
    return out


def worth(profile: Sequence[float]) -> list[float]:
    """dE/dp_i = ``(1/p_i) sum_{m>=i} p_1...p_m``: what a step accepts more for each point that position i gains."""
    through = np.cumprod(profile)
    return [float(through[i:].sum() / profile[i]) for i in range(len(profile))]


def main() -> int:
    """Draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    draw(parser.parse_args().out)
    return 0


def draw(out: Path) -> None:
    """Left, what moving acceptance forward does; right, what a point of it is worth at each position."""
    with plain_settings(text_as_paths=True):
        figure = new_figure(10.2, 4.3)
        figure.set_facecolor(LIGHT.card)
        left, right = figure.add_axes((0.065, 0.15, 0.40, 0.66)), figure.add_axes((0.575, 0.15, 0.40, 0.66))
        for axes, title in ((left, "Moving acceptance forward"), (right, "What a point of acceptance is worth")):
            bare_axes(axes, LIGHT)
            note(
                axes, title, (0, 1), (0, 24), xycoords="axes fraction", color=LIGHT.ink, fontsize=13, fontweight="bold"
            )
        amounts = np.linspace(0, 0.1, 21)
        colours = (LIGHT.accent, OTHERS[1][0], OTHERS[3][0])
        for (profile, source, target, by), colour in zip(PROFILES, colours, strict=True):
            gain = [expected_accepted(moved(profile, source, target, z)) - expected_accepted(profile) for z in amounts]
            falling = all(a >= b for a, b in pairwise(profile))
            left.plot(amounts, gain, color=colour, linewidth=2.4, linestyle="-" if falling else (0, (4, 2)))
            way = f"{', '.join(f'{p:g}' for p in profile)}:  {source + 1} → {target + 1}"
            ha = "right" if by[0] < 0 else "left"
            note(left, way, (amounts[11], gain[11]), by, ha=ha, color=colour, fontsize=10)
        left.axhline(0, color=LIGHT.faint, linewidth=1)
        left.set_xlim(0, 0.102)
        left.set_ylim(-0.085, 0.185)
        left.set_xlabel("acceptance moved from a later position to an earlier one")
        left.yaxis.set_major_formatter(lambda value, _: f"{value:+.2f}" if abs(value) > 1e-9 else "0")
        words = "change of the tokens accepted a step, by acceptance of 1, 2, 3"
        note(left, words, (0, 1), (0, 7), xycoords="axes fraction", color=LIGHT.muted, fontsize=10)
        places = range(1, 1 + len(EQUAL))
        values = worth(EQUAL)
        right.bar(places, values, width=0.66, color=[LIGHT.accent if i <= 2 else LIGHT.soft for i in places])
        for place, value in zip(places, values, strict=True):
            note(right, f"{value:.2f}", (place, value), (0, 4), ha="center", color=LIGHT.ink, fontsize=10)
        right.set_xlabel("drafted position")
        right.set_ylim(0, 1.18 * max(values))
        words = "tokens a step, all seven at 0.8; dark: the serial head's"
        note(right, words, (0, 1), (0, 7), xycoords="axes fraction", color=LIGHT.muted, fontsize=10)
        save(figure, out)


if __name__ == "__main__":
    sys.exit(main())
