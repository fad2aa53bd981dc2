"""The lines between groups of patches, exactly anti-aliased."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def cell_of_pixel(pixels: int, cells: int) -> NDArray[np.int64]:
    """The cell that the middle of each pixel lies in ``(pixels,)``, where as many cells share the length evenly."""
    cell: NDArray[np.int64] = (2 * np.arange(pixels, dtype=np.int64) + 1) * cells // (2 * pixels)
    return cell


def border_coverage(groups: NDArray[np.int64], size: tuple[int, int], width: float) -> NDArray[np.float64]:
    """How much of each pixel the border lines cover, 0..1.

    A line runs along every side that two patches of different groups share, ``width`` wide and around the side's
    middle. It has square ends, so that lines meet. All lines are along the axes: a pixel's share in one is the
    product of two overlaps of intervals, and the share in all lines of one direction is a product of matrices. Of
    the two directions the larger share counts.

    Args:
        groups: ``(H, W)``, the group of each patch.
        size: height and width of the picture in pixels.
        width: of the lines in pixels.

    Returns:
        ``(height, width)``.
    """
    upright = (groups[:, 1:] != groups[:, :-1]).astype(np.float64)  # (H, W-1): a line right of the patch
    level = (groups[1:] != groups[:-1]).astype(np.float64)  # (H-1, W): a line below the patch
    (rows, columns), (h, w) = groups.shape, size
    along_y, across_y = _ends(h, rows, width), _sides(h, rows, width)
    along_x, across_x = _ends(w, columns, width), _sides(w, columns, width)
    # Lines that go on overlap by their ends, and must not count twice there: it would show as a dot.
    down = np.minimum(along_y @ upright, 1.0) @ across_x.T
    right = across_y @ np.minimum(level @ along_x.T, 1.0)
    covered: NDArray[np.float64] = np.minimum(np.maximum(down, right), 1.0)
    return covered


def _sides(pixels: int, cells: int, width: float) -> NDArray[np.float64]:
    """Overlap ``(pixels, cells - 1)`` of each pixel with a line across each inner side."""
    middle = np.arange(1, cells, dtype=np.float64) * (pixels / cells)
    return _overlap(pixels, middle - width / 2, middle + width / 2)


def _ends(pixels: int, cells: int, width: float) -> NDArray[np.float64]:
    """Overlap ``(pixels, cells)`` of each pixel with a line along each cell."""
    start = np.arange(cells, dtype=np.float64) * (pixels / cells)
    return _overlap(pixels, start - width / 2, start + pixels / cells + width / 2)


def _overlap(pixels: int, start: NDArray[np.floating[Any]], end: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
    left = np.arange(pixels, dtype=np.float64)[:, None]
    overlap: NDArray[np.float64] = np.clip(np.minimum(left + 1, end) - np.maximum(left, start), 0.0, 1.0)
    return overlap
