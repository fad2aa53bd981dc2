"""Name the lines of a chart beside the lines themselves, where the names hide nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Width of an average letter and height of a line, as shares of the font size. Generous: fonts differ.
_LETTER, _HEIGHT = 0.6, 1.15
_NEAR = 5.0


@dataclass(frozen=True)
class Label:
    """A name to write once somewhere along its line."""

    text: str
    color: str
    xs: Sequence[float]
    ys: Sequence[float]
    size: float
    bold: bool


@dataclass(frozen=True)
class _Spot:
    """A place for a label: beside which point of the line, where that is, how aligned, and whether to lead there."""

    anchor: tuple[float, float]
    at: tuple[float, float]
    offset: tuple[float, float]
    ha: str
    va: str
    far: bool


@dataclass(frozen=True)
class Box:
    """A rectangle on the page, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: Box) -> float:
        """Return the area shared with ``other``."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(wide, 0.0) * max(high, 0.0)

    def grown(self, by: float) -> Box:
        """Return the box with a border of ``by`` points added."""
        return Box(self.left - by, self.bottom - by, self.right + by, self.top + by)

    def holds(self, spots: Sequence[tuple[float, float]]) -> int:
        """Return how many ``spots`` lie inside."""
        return sum(self.left < x < self.right and self.bottom < y < self.top for x, y in spots)


def text_box(text: str, size: float, x: float, y: float, ha: str, va: str) -> Box:
    """Return about where ``text`` lands when it is aligned to ``(x, y)``."""
    width, height = _LETTER * size * len(text), _HEIGHT * size
    left = x - {"left": 0.0, "center": width / 2, "right": width}[ha]
    bottom = y - {"bottom": 0.0, "center": height / 2, "top": height}[va]
    return Box(left, bottom, left + width, bottom + height)


def place(axes: Axes, labels: Sequence[Label], taken: Sequence[Box]) -> None:
    """Write every label at the spot near its own line that covers the least of everything else.

    Args:
        axes: Where to write; its limits must be final.
        labels: The names, the most important last (it is placed first).
        taken: Rectangles that already hold words.
    """
    window = axes.get_window_extent()
    inside = Box(window.x0, window.y0, window.x1, window.y1)
    paths = [_spots(axes, label) for label in labels]
    boxes = list(taken)
    for index in reversed(range(len(labels))):
        label = labels[index]
        foreign = [spot for other, path in enumerate(paths) if other != index for spot in path]
        best: tuple[float, Box, _Spot] | None = None
        for order, spot in enumerate(_candidates(axes, label)):
            (x, y), ha, va = spot.at, spot.ha, spot.va
            box = text_box(label.text, label.size, x, y, ha, va)
            area = (box.right - box.left) * (box.top - box.bottom)
            cost = (
                8.0 * (area - box.overlap(inside)) / area
                + 6.0 * sum(box.overlap(other) for other in boxes) / area
                + 0.6 * box.holds(foreign)
                + 0.3 * box.holds(paths[index])
                + 0.2 * box.grown(_NEAR).holds(foreign)  # a name between two lines belongs to neither
                + 0.01 * order
            )
            if best is None or cost < best[0]:
                best = (cost, box, spot)
        assert best is not None, "a line has at least one point"
        _, box, spot = best
        boxes.append(box)
        leader = {"arrowstyle": "-", "color": label.color, "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            label.text,
            spot.anchor,
            xytext=spot.offset,
            textcoords="offset points",
            color=label.color,
            fontsize=label.size,
            ha=spot.ha,
            va=spot.va,
            fontweight="bold" if label.bold else "normal",
            zorder=8,
            arrowprops=leader if spot.far else None,
            annotation_clip=False,
        )


def _pixels(axes: Axes, xs: Sequence[float], ys: Sequence[float]) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in axes.transData.transform(np.column_stack([xs, ys]))]


def _spots(axes: Axes, label: Label) -> list[tuple[float, float]]:
    """Return points every few points along the line of ``label``, so that covering it can be counted."""
    corners = _pixels(axes, label.xs, label.ys)
    spots = list(corners)
    for (x0, y0), (x1, y1) in pairwise(corners):
        steps = max(2, int(((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5 / 5))
        spots += [(x0 + (x1 - x0) * step / steps, y0 + (y1 - y0) * step / steps) for step in range(1, steps)]
    return spots


def _candidates(axes: Axes, label: Label) -> Iterator[_Spot]:
    """Return the spots to try, best first: around each measured point, starting where the lines are far apart."""
    gap = 7.0
    for of, anchor in zip(_pixels(axes, label.xs, label.ys), zip(label.xs, label.ys, strict=True), strict=True):
        for far, reach in ((False, gap), (True, 2.4 * gap), (True, 4.2 * gap)):
            for dx, dy in ((-1, 0), (1, 0), (0, -1), (0, 1), (1, -1), (-1, 1), (-1, -1), (1, 1)):
                ha = {-1: "right", 0: "center", 1: "left"}[dx]
                va = {-1: "top", 0: "center", 1: "bottom"}[dy]
                yield _Spot(anchor, (of[0] + dx * reach, of[1] + dy * reach), (dx * reach, dy * reach), ha, va, far)
