"""Colours for groups that reach over several frames: the same in every frame, and never the neighbour's."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# Chosen to be as far apart as twelve colours can be (0.09 in OKLab) for readers with full colour vision and with
# deuteranopia, protanopia and tritanopia alike; the first few also look well together.
HUES: tuple[str, ...] = (
    *("#4c9deb", "#e1b942", "#dc7095", "#751e5f", "#82eafc", "#78792b"),
    *("#4055ac", "#c2e59f", "#934f71", "#a4bbff", "#ad9907", "#35520b"),
)


def spanning(groups: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
    """Which groups have members at several steps in time ``(count,)``.

    Args:
        groups: ``(T, H, W)``, 0..count-1 or -1 for dropped.
        count: how many groups there are.
    """
    steps = np.zeros((count, len(groups)), dtype=bool)
    t, y, x = np.nonzero(groups >= 0)
    steps[groups[t, y, x], t] = True
    return np.asarray(steps.sum(1) > 1)


def hues(groups: NDArray[np.int64], count: int, wanted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Which of `HUES` each wanted group gets ``(count,)``, -1 for the others.

    The largest group chooses first. Each takes the colour that fewest have, of those that no group beside it has:
    beside it in the picture, corners too, or in its place at the next step, where a change of colour shows that the
    token ended. Up to twelve groups all differ; where all twelve colours are around, the rarest there is taken.

    Args:
        groups: ``(T, H, W)``, 0..count-1 or -1 for dropped.
        count: how many groups there are.
        wanted: ``(count,)``, the groups to colour.
    """
    sizes = np.bincount(groups[groups >= 0], minlength=count)
    beside: list[list[int]] = [[] for _ in range(count)]
    for one, other in _touching(groups).tolist():
        beside[one].append(other)
        beside[other].append(one)
    chosen = np.full(count, -1, dtype=np.int64)
    used = np.zeros(len(HUES), dtype=np.int64)
    for group in np.argsort(-sizes, kind="stable").tolist():
        if wanted[group]:
            around = chosen[beside[group]]
            taken = np.bincount(around[around >= 0], minlength=len(HUES))
            chosen[group] = np.lexsort((used, taken))[0]
            used[chosen[group]] += 1
    return chosen


def _touching(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The pairs ``(P, 2)`` of different groups that touch, each once."""
    across = [
        (groups[:, :, 1:], groups[:, :, :-1]),
        (groups[:, 1:], groups[:, :-1]),
        (groups[:, 1:, 1:], groups[:, :-1, :-1]),
        (groups[:, 1:, :-1], groups[:, :-1, 1:]),
        (groups[1:], groups[:-1]),
    ]
    pairs = np.concatenate([np.stack([one.ravel(), other.ravel()], -1) for one, other in across])
    pairs = np.sort(pairs[(pairs >= 0).all(1) & (pairs[:, 0] != pairs[:, 1])], axis=1)
    return np.unique(pairs, axis=0)
