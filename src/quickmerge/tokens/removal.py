"""How many tokens every block of a vision transformer takes out: constant, falling, rising, or listed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quickmerge.errors import whole_number


@dataclass(frozen=True)
class Removal:
    """Take ``r`` tokens out in every block (ToMe, arXiv 2210.09461).

    With an ``inflection`` c the numbers go in a straight line from ``r (1 - c)`` in the first block to
    ``r (1 + c)`` in the last: 0 is constant, -1 falls from ``2 r`` to 0, 1 rises from 0 to ``2 r``. Numbers are
    rounded so that the running total is the nearest whole number to the line's, and no token is lost to rounding.

    Args:
        r: tokens per block, or one number for each block; blocks that a list does not reach take none out.
        inflection: in [-1, 1]; 0 where ``r`` is a list.

    Raises:
        ValueError: for a number out of range, or an inflection of a list.
    """

    r: int | tuple[int, ...]
    inflection: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.r, Sequence):
            object.__setattr__(self, "r", tuple(whole_number("r", each, 0) for each in self.r))
            if self.inflection:
                raise ValueError(f"inflection must be 0 where r is a list, got {self.inflection!r}")
        else:
            object.__setattr__(self, "r", whole_number("r", self.r, 0))
        if not (isinstance(self.inflection, (int, float)) and -1 <= self.inflection <= 1):
            raise ValueError(f"inflection must be a number in [-1, 1], got {self.inflection!r}")

    def wanted(self, depth: int) -> list[int]:
        """How many tokens each of ``depth`` blocks is asked to take out.

        Raises:
            ValueError: if a list has more numbers than there are blocks.
        """
        if isinstance(self.r, tuple):
            if len(self.r) > depth:
                raise ValueError(f"r must hold at most {depth} numbers, one for each block, got {len(self.r)}")
            return [*self.r, *[0] * (depth - len(self.r))]
        slope = 2 * self.r * self.inflection / (depth - 1) if depth > 1 else 0.0
        start = self.r * (1 - self.inflection) if depth > 1 else float(self.r)
        return _whole_steps([start + slope * block for block in range(depth)])

    def counts(self, tokens: int, prefix: int, depth: int) -> list[int]:
        """How many of ``tokens`` are left after each block. No block takes more than half of those behind the prefix.

        Args:
            tokens: how many enter the first block, those of the prefix included.
            prefix: tokens at the start that are never taken out.
            depth: how many blocks there are.
        """
        left, out = tokens, []
        for r in self.wanted(depth):
            left -= max(0, min(r, (left - prefix) // 2))
            out.append(left)
        return out


def removal_for(keep: float, tokens: int, prefix: int, depth: int) -> Removal:
    """The constant removal whose blocks together read the share ``keep`` of the tokens, as nearly as can be.

    Of ``n_l`` tokens left after block l, ``sum_l n_l = keep * tokens * depth``, so that a method costs what another
    one costs that keeps the share ``keep`` throughout, but for what attention saves beyond the line. Blocks take out
    the whole numbers nearest to a real one, so the sum is met to a token for each block.

    Raises:
        ValueError: if ``keep`` is not in (0, 1], or is less than is left when every block takes out half.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep must be a number in (0, 1], got {keep!r}")

    def total(r: float) -> int:
        return sum(_even(r, depth).counts(tokens, prefix, depth))

    low, high, wanted = 0.0, float(tokens), keep * tokens * depth
    if total(high) > wanted + depth:
        least = total(high) / (tokens * depth)
        raise ValueError(f"keep must be at least {math.ceil(1000 * least) / 1000:g} for {tokens} tokens, got {keep:g}")
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if total(middle) > wanted else (low, middle)
    return min(
        (_even(low, depth), _even(high, depth)), key=lambda x: abs(sum(x.counts(tokens, prefix, depth)) - wanted)
    )


def _even(r: float, depth: int) -> Removal:
    return Removal(tuple(_whole_steps([r] * depth)))


def _whole_steps(line: list[float]) -> list[int]:
    """Whole numbers whose running total is the nearest to that of ``line``; halves go up."""
    out, total, given = [], 0.0, 0
    for each in line:
        total += each
        step = math.floor(total + 0.5 + 1e-9) - given
        out.append(step)
        given += step
    return out
