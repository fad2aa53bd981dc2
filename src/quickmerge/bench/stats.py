"""Numbers with their uncertainty: intervals of the bootstrap, and medians with quartiles."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from quickmerge.errors import whole_number

__all__ = ["bootstrap", "mean_interval", "quartiles", "ratio_interval", "spread", "wilson"]

AT_ONCE = 2**22
"""Numbers of a resampled sample that are held at a time."""


def bootstrap(
    statistic: Callable[..., Any], *samples: ArrayLike, resamples: int = 2000, seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ends of the 95 % percentile interval of a statistic, observations drawn with replacement.

    Resamples for which the statistic is not a number are left out: a ratio whose lower sum is 0 says nothing.

    Args:
        statistic: called with resampled ``samples``, the observations last, and ``axis=-1``. It may give several
            numbers, ``(..., resamples)``.
        samples: ``(n,)`` each. They are paired: an observation is drawn for all of them at once.
        resamples: how often.
        seed: of the draws.

    Raises:
        ValueError: there is no observation, or the samples are of different lengths.
    """
    data = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if not data or not len(data[0]) or len({len(sample) for sample in data}) > 1:
        raise ValueError(f"samples must be of one length of at least 1, got {[len(sample) for sample in data]}")
    resamples = whole_number("resamples", resamples)
    if len(data[0]) == 1:  # of which scipy makes no interval: it is drawn each time
        drawn = np.asarray(statistic(*(sample[None] for sample in data), axis=-1), dtype=np.float64)
    else:
        with warnings.catch_warnings():  # that scipy's own interval has no number where a draw has none
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            drawn = stats.bootstrap(
                data, statistic, n_resamples=resamples, batch=max(1, AT_ONCE // len(data[0])), vectorized=True,
                paired=True, method="percentile", rng=np.random.default_rng(seed),
            ).bootstrap_distribution  # fmt: skip
    low, high = np.nanpercentile(drawn, [2.5, 97.5], axis=-1)
    return low, high


def ratio_interval(top: ArrayLike, bottom: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``sum(top) / sum(bottom)``, both ``(n,)``, over observations that are drawn for both at once."""

    def ratio(top: NDArray[np.float64], bottom: NDArray[np.float64], axis: int) -> NDArray[np.float64]:
        below = bottom.sum(axis)
        share: NDArray[np.float64] = np.divide(top.sum(axis), below, out=np.full_like(below, np.nan), where=below > 0)
        return share

    low, high = bootstrap(ratio, top, bottom, resamples=resamples, seed=seed)
    return float(low), float(high)


def mean_interval(values: Sequence[float], *, resamples: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The mean, and the ends of its 95 % interval."""
    return sum(values) / len(values), *ratio_interval(values, np.ones(len(values)), resamples=resamples, seed=seed)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of fewer than three values the least, the median and the most."""
    if len(values) < 3:  # quartiles would lie outside of them
        return min(values), median(values), max(values)
    low, _, high = quantiles(values, n=4)
    return low, median(values), high


def spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """The median under ``name`` and the quartiles under ``name_low`` and ``name_high``, as rows have them."""
    low, middle, high = quartiles(values)
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def wilson(hits: int, tries: int) -> tuple[float, float]:
    """95 % interval of a share, ``hits`` of ``tries`` independent ones (Wilson, 1927): sound for few and for all.

    Raises:
        ValueError: there is no try, or more hits than tries.
    """
    if not 0 <= hits <= tries or not tries:
        raise ValueError(f"hits must be from 0 to tries, and tries at least 1, got {hits} of {tries}")
    found = stats.binomtest(hits, tries).proportion_ci(0.95, method="wilson")
    return float(found.low), float(found.high)
