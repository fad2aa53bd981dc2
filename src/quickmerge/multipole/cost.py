"""What a new token costs with multipole attention and without it, and from what length that pays."""

from __future__ import annotations

from collections.abc import Callable

from quickmerge.multipole.settings import Multipole

__all__ = ["clusters_of", "least", "pays_from", "rows_read"]

MOST = 2**20
"""Tokens beyond which nobody looks for where something pays."""

BESIDE = 12 << 20
"""What a block spends on choosing clusters and on its share of an update takes as long as reading so many bytes."""

FETCHED = 3.5
"""A key or value that is fetched from where it lies takes as much longer than one of many that lie in a row.

Both are fits to the table of steps in docs/results/multipole-speed.md: one core, float32, two shapes.
"""


def clusters_of(settings: Multipole, tokens: float) -> float:
    """Clusters of so many keys, both levels."""
    inside = max(0.0, tokens - settings.sink - 1.5 * settings.interval)
    return inside * settings.ratio + (inside * settings.coarse if settings.coarse is not None else 0)


def rows_read(settings: Multipole, tokens: float) -> float:
    """Rows that a new token reads of so many keys: first and newest ones, clusters, and what is read exactly."""
    exact = settings.sink + 1.5 * settings.interval  # of the newest there are one to two intervals
    return exact + clusters_of(settings, tokens) + settings.budget


def pays_from(settings: Multipole, heads: int, width: int, bytes_per_value: int) -> int | None:
    """The fewest tokens in the cache from which on a block reads a new token's past faster by clusters than in full.

    Counted in bytes. Reading in full takes those of all keys and values. Clusters take theirs, those of what is fetched
    `FETCHED` times more, and `BESIDE` on top. A machine on which small operations cost less by the side of memory pays
    from fewer tokens on; ``benchmarks/multipole_speed.py`` measures one.

    Args:
        settings: of multipole attention.
        heads: key-value heads of a block.
        width: of a key.
        bytes_per_value: of the cache.

    Returns:
        The length; None if there is none below 2^20.
    """
    row = 2 * heads * width * bytes_per_value
    fetched = FETCHED * settings.budget * row
    found = least(lambda n: rows_read(settings, n) * row + fetched + BESIDE < n * row)
    return None if found is None else max(found, settings.min_tokens)


def least(pays: Callable[[int], bool]) -> int | None:
    """The fewest tokens at which something pays that goes on to pay beyond them."""
    if not pays(MOST):
        return None
    low, high = 1, MOST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle + 1, high)
    return low
