"""How many drafted tokens are accepted, by how probable each is to be."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["expected_accepted"]


def expected_accepted(p: Sequence[float]) -> float:
    """``E[L] = sum_i prod_{j <= i} p_j``: how many of a chain of drafted tokens are accepted on average.

    The target's own token comes on top. If ``p`` does not rise, moving acceptance from later to earlier tokens does
    not lower E[L] (arXiv 2503.10135, theorem 3.1): with the sum of ``p`` kept, it is better spent early. If ``p``
    rises somewhere that may be wrong: (.9, .1, .9) gives 1.071, (.95, .05, .9) only 1.04.

    Args:
        p: for each drafted token the probability that it is accepted, given that those before it are.

    Raises:
        ValueError: if one is no probability.
    """
    total, path = 0.0, 1.0
    for i, chance in enumerate(p):
        if not 0 <= chance <= 1:
            raise ValueError(f"p[{i}] must be a probability, 0 to 1, got {chance!r}")
        path *= chance
        total += path
    return total
