"""BrierLM: the quality of a language model judged by its samples alone (CALM, arXiv 2510.27688, section on evaluation).

The Brier score of a distribution P at an outcome y is ``2 P(y) - sum_x P(x)^2``: strictly proper, highest on average
where P is the truth, 1 at best and -1 at worst. Both parts are probabilities of events that samples show: that a sample
is y, and that two independent samples are the same. So samples give an unbiased estimate of it, and no likelihood is
needed. Brier-n is the score of the next n tokens as one outcome, and ``BrierLM = 100 (B_1 B_2 B_3 B_4)^(1/4)``, with
each mean score B_n over positions clamped at zero by itself: two negative ones would else pass as a good model.

Where a sample is one chunk of K >= n tokens, one draw of R chunks gives everything (`brier_terms`). Where n tokens take
several chunks ``x = (x_1, ..., x_C)``, the parts are taken chunk by chunk, each from R fresh samples:

- ``P(y) = prod_c P(y_c | y_<c)``: the samples at chunk c are drawn behind the true text, so the shares of hits of
  different chunks are independent, and the mean of their product is the product of their means.
- ``sum_x P(x)^2 = sum_{x_1} P(x_1)^2 sum_{x_2} P(x_2 | x_1)^2 ...``. Let ``W_1`` be the share of equal pairs among the
  R samples of the first chunk, and g the value of a pair that is drawn among the equal ones. Of the R samples, N_v have
  value v, so that ``W_1 = sum_v w_v`` with ``w_v = N_v (N_v - 1) / (R (R - 1))``, whose mean is ``P(v)^2``, and g is v
  with probability ``w_v / W_1``. If ``C_g`` is an unbiased estimate of the inner sum behind g, made of fresh samples,
  ``E[W_1 C_g] = E[W_1 sum_v (w_v / W_1) C_v] = sum_v P(v)^2 E[C_v]``. The same again inside: one path of colliding
  chunks (`colliding_sample`), and the product of the shares along it (`along_chunks`). It ends where no pair is equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quickmerge.bench.stats import bootstrap
from quickmerge.errors import QuickmergeError

__all__ = [
    "GRAMS",
    "BrierGap",
    "BrierScore",
    "along_chunks",
    "brier_gap",
    "brier_lm",
    "brier_score",
    "brier_terms",
    "colliding_sample",
    "collision_shares",
    "hit_shares",
]

GRAMS = 4
"""Tokens of the longest n-gram of BrierLM."""

AT_ONCE = 2**24
"""Comparisons of tokens that are held at a time."""


def hit_shares(samples: Tensor, target: Tensor) -> Tensor:
    """Share of the samples whose first n tokens are the target's.

    Args:
        samples: ``(R, P, K)`` token ids, R independent draws at each of P positions.
        target: ``(P, K)``.

    Returns:
        ``(P, K)`` float64; entry ``n - 1`` is for the first n tokens. Its mean is ``P(y_1..n)``.

    Raises:
        ValueError: the shapes do not fit.
    """
    if samples.ndim != 3 or samples.shape[1:] != target.shape or samples.shape[0] < 1:
        raise ValueError(
            f"samples must have shape (R, P, K) with R of at least 1 and target (P, K), got {tuple(samples.shape)} "
            f"and {tuple(target.shape)}"
        )
    return (samples == target).to(torch.int8).cumprod(-1).double().mean(0)


def collision_shares(samples: Tensor) -> Tensor:
    """Share of the pairs of different samples whose first n tokens are the same: a U-statistic.

    Args:
        samples: ``(R, P, K)`` token ids, R of at least 2 independent draws at each of P positions.

    Returns:
        ``(P, K)`` float64; entry ``n - 1`` is for the first n tokens. Its mean is ``sum_x P(x_1..n)^2``.

    Raises:
        ValueError: the shape does not fit.
    """
    if samples.ndim != 3 or samples.shape[0] < 2:
        raise ValueError(f"samples must have shape (R, P, K) with R of at least 2, got {tuple(samples.shape)}")
    count = samples.shape[0]
    parts = [_equal(part).double().sum((0, 1)) for part in _blocks(samples)]
    pairs = torch.cat(parts) if parts else samples.new_zeros(samples.shape[1:], dtype=torch.float64)
    return (pairs - count) / (count * (count - 1))  # a sample and itself are no pair


def brier_terms(samples: Tensor, target: Tensor) -> Tensor:
    """Brier-1 to Brier-n of every position, unbiased each, from samples of n tokens.

    Args:
        samples: ``(R, P, n)`` token ids, R of at least 2 independent draws at each of P positions.
        target: ``(P, n)``, what stands there.

    Returns:
        ``(P, n)`` float64, each in [-1, 2]; a mean over positions estimates a score in [-1, 1].

    Raises:
        ValueError: the shapes do not fit.
    """
    return 2 * hit_shares(samples, target) - collision_shares(samples)


def colliding_sample(samples: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """For each position, one of the samples that some other equals: a pair is drawn among the equal ones.

    Args:
        samples: ``(R, P, K)``.
        generator: where the draw comes from; None for the global generator.

    Returns:
        ``(P, K)``, the value of the pair. Where no two samples are equal, any of the samples: multiply with
        `collision_shares`, which is zero there.
    """
    # A value of N samples gets weight N (N - 1): each of the N samples counts how many others equal it.
    others = torch.cat([_equal(part)[..., -1].sum(0) for part in _blocks(samples)], -1) - 1  # (R, P)
    weight = others.T.double()
    weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, torch.ones_like(weight))
    if generator is not None:
        weight = weight.to(generator.device)
    chosen = torch.multinomial(weight, 1, generator=generator)[:, 0].to(samples.device)
    return samples[chosen, torch.arange(samples.shape[1], device=samples.device)]


def along_chunks(shares: Sequence[Tensor], n: int = GRAMS) -> Tensor:
    """Shares for the first 1 to n tokens, from the shares of chunks of K tokens one behind the other.

    Args:
        shares: for each chunk ``(P, K)``: entry ``k - 1`` for its first k tokens, given the chunks before it.
        n: tokens; at most K times the number of chunks.

    Returns:
        ``(P, n)``: m tokens are the product of all whole chunks before the one that token m is in, and of that
        chunk's part.
    """
    out, whole = [], torch.ones_like(shares[0][:, :1])
    for share in shares:
        out.append(whole * share)
        whole = out[-1][:, -1:]
    return torch.cat(out, -1)[:, :n]


def brier_lm(terms: Tensor | NDArray[Any]) -> float:
    """BrierLM of terms ``(P, 4)``: 100 times the geometric mean of the four means, each at least zero.

    Raises:
        ValueError: the shape does not fit.
    """
    return float(_of_means(_checked(terms).mean(0)))


@dataclass(frozen=True)
class BrierScore:
    """BrierLM with a bootstrap interval.

    Attributes:
        value: BrierLM, in [0, 100].
        low, high: 95 % interval over groups drawn with replacement.
        terms: Brier-1 to Brier-4, means as they are, perhaps below zero.
        terms_low, terms_high: their intervals.
        positions: how many were scored.
        groups: how many documents or windows these are of.

    The terms are unbiased. BrierLM itself is not quite, since it is no linear function of them.
    """

    value: float
    low: float
    high: float
    terms: tuple[float, ...]
    terms_low: tuple[float, ...]
    terms_high: tuple[float, ...]
    positions: int
    groups: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


@dataclass(frozen=True)
class BrierGap:
    """How much more BrierLM one model has than another at the same positions, with a paired 95 % interval."""

    value: float
    low: float
    high: float


def brier_score(
    terms: Tensor | NDArray[Any], groups: Sequence[int] | Tensor | None = None, *, resamples: int = 2000, seed: int = 0
) -> BrierScore:
    """BrierLM of terms ``(P, 4)``, with an interval over ``groups`` of positions that are drawn as one.

    Args:
        terms: unbiased terms of P positions.
        groups: ``(P,)``, the document or window of each; positions of one depend on each other. None: each by itself.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        ValueError: the shapes do not fit.
    """
    table = _checked(terms)
    sums, counts = _by_group(table, groups)

    def score(*drawn: NDArray[Any], axis: int) -> NDArray[Any]:
        means = _means(drawn, axis)
        both: NDArray[Any] = np.stack([_of_means(means), *means])
        return both

    lows, highs = (ends.tolist() for ends in bootstrap(score, *sums.T, counts, resamples=resamples, seed=seed))
    means = table.mean(0)
    return BrierScore(
        float(_of_means(means)), lows[0], highs[0], tuple(means.tolist()), tuple(lows[1:]), tuple(highs[1:]),
        len(table), len(counts),
    )  # fmt: skip


def brier_gap(
    first: Tensor | NDArray[Any],
    second: Tensor | NDArray[Any],
    groups: Sequence[int] | Tensor | None = None,
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> BrierGap:
    """BrierLM of the first less that of the second, both of the same positions; arguments as `brier_score`."""
    tables = [_checked(first), _checked(second)]
    if len(tables[0]) != len(tables[1]):
        raise ValueError(f"terms must be of the same positions, got {len(tables[0])} and {len(tables[1])}")
    (mine, counts), (other, _) = (_by_group(table, groups) for table in tables)

    def gap(*drawn: NDArray[Any], axis: int) -> NDArray[Any]:
        *sums, count = drawn
        first, second = (_of_means(_means((*half, count), axis)) for half in (sums[:GRAMS], sums[GRAMS:]))
        difference: NDArray[Any] = first - second
        return difference

    low, high = bootstrap(gap, *mine.T, *other.T, counts, resamples=resamples, seed=seed)
    value = _of_means(tables[0].mean(0)) - _of_means(tables[1].mean(0))
    return BrierGap(float(value), float(low), float(high))


def _equal(samples: Tensor) -> Tensor:
    """``(R, R, P, K)``: whether two samples have the same first tokens."""
    return (samples[:, None] == samples[None]).to(torch.int8).cumprod(-1)


def _blocks(samples: Tensor) -> Sequence[Tensor]:
    count, _, width = samples.shape
    return torch.split(samples, max(1, AT_ONCE // (count * count * width)), 1)


def _of_means(means: NDArray[Any]) -> NDArray[Any]:
    # Each by itself: the product of two negative means is positive.
    product: NDArray[Any] = np.maximum(means, 0).prod(0)
    return 100 * product ** (1 / GRAMS)


def _checked(terms: Tensor | NDArray[Any]) -> NDArray[Any]:
    table: NDArray[Any] = np.asarray(terms.cpu() if isinstance(terms, Tensor) else terms, np.float64)
    if table.ndim != 2 or table.shape[1] != GRAMS or not len(table):
        raise ValueError(f"terms must have shape (P, {GRAMS}) with P of at least 1, got {table.shape}")
    if not np.isfinite(table).all():
        raise QuickmergeError("terms must be finite")
    return table


def _by_group(table: NDArray[Any], groups: Sequence[int] | Tensor | None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Sums ``(G, 4)`` and numbers ``(G,)`` of the terms of each group."""
    if groups is None:
        return table, np.ones(len(table))
    names = np.asarray(groups.cpu() if isinstance(groups, Tensor) else groups)
    if names.shape != (len(table),):
        raise ValueError(f"groups must name one of each of {len(table)} positions, got shape {names.shape}")
    _, which = np.unique(names, return_inverse=True)
    sums = np.zeros((which.max() + 1, table.shape[1]))
    np.add.at(sums, which, table)
    return sums, np.bincount(which).astype(np.float64)


def _means(drawn: Sequence[NDArray[Any]], axis: int) -> NDArray[Any]:
    """``(4, ...)`` means of groups that were drawn: four sums of each, and its number of terms."""
    *sums, counts = drawn
    means: NDArray[Any] = np.stack([each.sum(axis) for each in sums]) / counts.sum(axis)
    return means
