"""Sampling at a temperature from a model that only gives samples (CALM, arXiv 2510.27688, likelihood-free sampling).

The aim is ``P_T(x) ~ P(x)^(1/T)`` for T in (0, 1], from draws of P alone. With ``1/T = n + a``, n whole and 0 <= a < 1:

- `exact`: draw until n draws agree on x, beginning anew at the first that does not; that happens with probability
  proportional to ``P(x)^n``. Then, if a > 0, draw on until x comes again: draw i that is not x sends back to the
  beginning with probability ``a / i``. With ``l = P(x)`` this accepts with probability
  ``l sum_j (1 - l)^j prod_{k=1..j} (1 - a/k) = l (1 - (1 - l))^(a - 1) = l^a`` (the binomial series), so that x comes
  out in proportion to ``P(x)^(n + a)``.
- `batch`, for T = 1/n: draw N times, and choose x with weight ``C(c, n)``, where x came c times: the number of
  n-subsets of the draws that agree on x, whose mean is ``C(N, n) P(x)^n``. The ratio of such weights is biased for
  finite N: it tends to P_T only as N grows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.models.generation import COOLEST

__all__ = ["Drawn", "Sampler", "batch", "batch_weights", "exact", "expected_draws", "split_inverse"]

Sampler = Callable[[int], Tensor]
"""From a number of draws to ``(count, B, K)`` token ids: so many independent chunks for each of B rows."""

BLOCK = 256
"""Most draws that `exact` asks for at a time."""

NEAR = 1e-9
"""How near, relatively, 1/T must be to a whole number to count as one: 1/49 has no exact floating-point number."""


@dataclass(frozen=True)
class Drawn:
    """Chunks that were sampled at a temperature.

    Attributes:
        chunks: ``(B, K)`` token ids.
        draws: ``(B,)``, how many draws of the model the algorithm looked at for each row.
        made: how many draws for each row the sampler was asked for, those that nobody looked at included.
        exact: ``(B,)``, False where `exact` gave up and the chunk is one at temperature 1, or where it is of `batch`.
    """

    chunks: Tensor
    draws: Tensor
    made: int
    exact: Tensor


def split_inverse(temperature: float) -> tuple[int, float]:
    """``1 / T = n + a`` as ``(n, a)``.

    Raises:
        QuickmergeError: the temperature is not in [1e-4, 1].
    """
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if not number or not 0 < temperature <= 1:
        raise QuickmergeError(
            f"temperature must be a number in (0, 1] for a model that only gives samples, got {temperature!r}"
        )
    if temperature < COOLEST:
        raise QuickmergeError(
            f"temperature must be at least {COOLEST:g} for a model that only gives samples, got {temperature!r}: "
            "1 / temperature draws must agree"
        )
    inverse = 1 / temperature
    if abs(inverse - round(inverse)) <= NEAR * inverse:
        return round(inverse), 0.0
    return math.floor(inverse), inverse - math.floor(inverse)


def expected_draws(probabilities: Tensor, temperature: float, *, early: bool = True) -> float:
    """Mean number of draws that `exact` looks at for one chunk.

    An attempt looks at ``1 + sum_{j=1..n-1} sum_x P(x)^j`` draws until they agree or do not, at
    ``[a > 0] sum_x P(x)^(n + a - 1)`` behind them, and is accepted with probability ``sum_x P(x)^(1/T)``.

    Args:
        probabilities: ``(V,)``, of every chunk.
        temperature: in (0, 1].
        early: an attempt ends at the first draw that differs; False for n draws in every attempt.

    Raises:
        QuickmergeError: the temperature is not in [1e-4, 1].
    """
    n, a = split_inverse(temperature)
    p = probabilities.double().flatten()
    p = p[p > 0]
    agree = 1 + sum(float((p**j).sum()) for j in range(1, n)) if early else float(n)
    behind = float((p ** (n + a - 1)).sum()) if a else 0.0
    return (agree + behind) / float((p ** (n + a)).sum())


def exact(
    sampler: Sampler,
    temperature: float,
    *,
    generator: torch.Generator | None = None,
    most_draws: int = 100_000,
    give_up: bool = False,
) -> Drawn:
    """One chunk for each row, distributed as ``P(x)^(1/T)`` without bias, by rejection.

    Draws are made in blocks for all rows at once. Each row reads its own column of independent draws in order, goes
    back to the beginning by itself, and stops by a rule that looks at nothing behind the draw it stops at. So what is
    left over of a block says nothing about what was accepted, and to throw it away changes no probability.

    Args:
        sampler: the model, see `Sampler`. All draws must be independent.
        temperature: in (0, 1]. The nearer to 0, and the less likely the likeliest chunk, the more draws it takes.
        generator: of the decisions, not of the chunks; None for the global generator.
        most_draws: for each row.
        give_up: let a row for which ``most_draws`` were not enough have the last draw, at temperature 1, and say so in
            `Drawn.exact`; False makes that an error.

    Raises:
        QuickmergeError: the temperature is not in (0, 1]; the draws were not enough; the sampler gives another shape.
        ValueError: ``most_draws`` is no whole number of at least 1.
    """
    n, a = split_inverse(temperature)
    most_draws = whole_number("most_draws", most_draws)
    rows: list[_Row] = []
    made, size = 0, n + (a > 0)
    last: Tensor | None = None
    while not rows or not all(row.done for row in rows):
        size = min(size, most_draws - made)
        if size == 0:
            slow = sum(not row.done for row in rows)
            if not give_up:
                raise QuickmergeError(
                    f"temperature {temperature:g} needs more than {most_draws} draws for {slow} of {len(rows)} rows, "
                    "as no chunk is likely enough there: give a higher temperature, more draws, or the batch method"
                )
            break
        last = _drawn(sampler, size, len(rows) or None)
        chunks = last.cpu()
        # The threshold of every decision, whether or not it is needed: a row's decisions do not hang on other rows'.
        origin = "cpu" if generator is None else generator.device
        luck = torch.rand(chunks.shape[:2], generator=generator, dtype=torch.float64, device=origin).cpu()
        rows = rows or [_Row(n, a) for _ in range(chunks.shape[1])]
        for row, column, lucky in zip(rows, chunks.transpose(0, 1).tolist(), luck.T.tolist(), strict=True):
            row.read(column, lucky)
        made += size
        size = min(2 * size, BLOCK)
    assert last is not None
    found = [row.value if row.done else last[-1, at].tolist() for at, row in enumerate(rows)]
    return Drawn(
        torch.tensor(found, dtype=last.dtype, device=last.device).reshape(last.shape[1:]),
        torch.tensor([row.draws for row in rows]),
        made,
        torch.tensor([row.done for row in rows], dtype=torch.bool),
    )


class _Row:
    """Where the rejection sampler of one row is."""

    def __init__(self, n: int, a: float) -> None:
        self.n, self.a = n, a
        self.value: Any = None
        self.agree = 0  # draws that agreed on the value so far
        self.wait = 0  # draws behind them
        self.draws = 0
        self.done = False

    def read(self, column: list[Any], luck: list[float]) -> None:
        """Go on through a block of draws, with a uniform number in [0, 1) for each."""
        for drawn, lucky in zip(column, luck, strict=True):
            if self.done:
                return
            self.draws += 1
            if self.agree == 0:
                self.value, self.agree, self.wait = drawn, 1, 0
            elif self.agree < self.n:
                # The draw that differs is thrown away with the attempt: kept, it would be one that is known to differ.
                self.agree = self.agree + 1 if drawn == self.value else 0
                if self.agree == 0:
                    continue
            elif drawn == self.value:
                self.done = True
                return
            else:
                self.wait += 1
                if lucky < self.a / self.wait:
                    self.agree = 0
                continue
            self.done = self.agree == self.n and self.a == 0


def batch_weights(counts: Tensor, n: int) -> Tensor:
    """Logarithm of ``C(c, n)``, float64 of the shape of ``counts``; minus infinity where c < n.

    By the logarithm of the gamma function, so that nothing overflows.
    """
    c = counts.double()
    log = torch.lgamma(c + 1) - math.lgamma(n + 1) - torch.lgamma((c - n).clamp_min(0) + 1)
    return log.masked_fill(c < n, -math.inf)


def batch(sampler: Sampler, temperature: float, count: int = 200, *, generator: torch.Generator | None = None) -> Drawn:
    """One chunk for each row, nearly distributed as ``P(x)^(1/T)``, from ``count`` draws and no more.

    Where no chunk came n times, those that came n - 1 times are chosen from, and so on: with few draws the result is
    nearer to temperature 1 than it was asked to be.

    Args:
        sampler: the model, see `Sampler`.
        temperature: 1/n for a whole n.
        count: N, draws for each row.
        generator: of the choice; None for the global generator.

    Raises:
        QuickmergeError: the temperature is no 1/n; the sampler gives another shape.
        ValueError: the count is no whole number of at least 1.
    """
    n, a = split_inverse(temperature)
    if a:
        raise QuickmergeError(
            f"temperature must be 1/n for a whole n with the batch method (1, 0.5, 1/3...), got {temperature:g}: use "
            "the exact method for others"
        )
    count = whole_number("count", count)
    chunks = _drawn(sampler, count, None)
    times = torch.stack([(chunks == chunk).all(-1).sum(0) for chunk in chunks])  # (N, B): how often each value came
    level = times.amax(0).clamp_max(n)  # (B,)
    log = torch.stack([batch_weights(times[:, row], int(level[row])) for row in range(times.shape[1])], -1)
    # Weight C(c, n) for a value is C(c, n) / c for each of its c draws. The largest is divided out first.
    log = log - times.double().log()
    weight = (log - log.amax(0)).exp().T
    if generator is not None:
        weight = weight.to(generator.device)
    chosen = torch.multinomial(weight, 1, generator=generator)[:, 0].to(chunks.device)
    rows = chunks.shape[1]
    return Drawn(
        chunks[chosen, torch.arange(rows, device=chunks.device)],
        torch.full((rows,), count),
        count,
        torch.full((rows,), n == 1),
    )


def _drawn(sampler: Sampler, count: int, rows: int | None) -> Tensor:
    chunks = sampler(count)
    if chunks.ndim != 3 or chunks.shape[0] != count or chunks.shape[1] == 0 or rows not in (None, chunks.shape[1]):
        wanted = f"({count}, {'B' if rows is None else rows}, K)"
        raise QuickmergeError(f"sampler must give {wanted} chunks, got shape {tuple(chunks.shape)}")
    return chunks
