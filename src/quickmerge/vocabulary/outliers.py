"""New rows that stand out from the shared ones, and what to do about them.

The same weights mean different vectors in two spaces, so a donor's row can be made to be nothing in the donor and loud
in the base (arXiv 2601.00065). Donor files are input from outside: report rows whose length, or whose largest logit, is
beyond what shared rows have, and cut lengths to it if asked to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.vocabulary.spaces import at_least_float32

__all__ = ["LogitReport", "NormReport", "clip_norms", "logit_report", "norm_report"]

CHUNK = 8192
"""Rows multiplied with the hidden states at a time."""


@dataclass(frozen=True)
class NormReport:
    """Lengths of new rows beside those of shared ones.

    Attributes:
        low, median, high: of the shared rows' lengths; low and high at the quantiles asked for.
        new_median: of the new rows.
        long: ``(L,)`` long, places of new rows longer than high, the longest first.
        short: ``(S,)`` long, of those shorter than low, the shortest first.
        longest: the longest new row over the median shared one.
    """

    low: float
    median: float
    high: float
    new_median: float
    long: Tensor
    short: Tensor
    longest: float


@dataclass(frozen=True)
class LogitReport:
    """Logits of new rows beside those of shared ones, over given hidden states.

    Attributes:
        shared_mean, shared_spread: over shared rows and states, in logits.
        new_mean, new_spread: over new rows and states; a mean apart from the shared one is an offset that all new
            tokens have at every position.
        high: the largest logits of shared rows, one each over all states, at the quantile asked for.
        loud: ``(L,)`` long, places of new rows whose largest logit is above, the loudest first.
        loudest: the largest logit of a new row.
        share_won: at how many of the states, as a share, a new row has the largest logit of all.
    """

    shared_mean: float
    shared_spread: float
    new_mean: float
    new_spread: float
    high: float
    loud: Tensor
    loudest: float
    share_won: float


def norm_report(new: Tensor, shared: Tensor, *, quantile: float = 0.99) -> NormReport:
    """Lengths of ``new (T, d)`` beside those of ``shared (N, d)``, at ``quantile`` and 1 - ``quantile``.

    Raises:
        QuickmergeError: if the shapes don't fit or the quantile isn't between 0.5 and 1.
    """
    new, shared = _checked(new, shared, quantile)
    own, theirs = new.norm(dim=1), shared.norm(dim=1)
    low, median, high = (_quantile(theirs, q) for q in (1 - quantile, 0.5, quantile))
    order = own.argsort()
    return NormReport(
        low=low,
        median=median,
        high=high,
        new_median=_quantile(own, 0.5),
        long=order.flip(0)[own[order.flip(0)] > high],
        short=order[own[order] < low],
        longest=float(own.max()) / max(median, torch.finfo(own.dtype).tiny),
    )


def clip_norms(new: Tensor, shared: Tensor, *, quantile: float = 0.99) -> Tensor:
    """``new (T, d)`` with every row longer than the ``quantile`` of the lengths of ``shared (N, d)`` cut to that.

    Directions stay, and rows that are short enough stay bit for bit.

    Raises:
        QuickmergeError: as `norm_report`.
    """
    exact, shared = _checked(new, shared, quantile)
    high, own = _quantile(shared.norm(dim=1), quantile), exact.norm(dim=1, keepdim=True)
    return torch.where(own > high, (exact * (high / own.clamp_min(torch.finfo(own.dtype).tiny))).to(new.dtype), new)


def logit_report(hidden: Tensor, new: Tensor, shared: Tensor, *, quantile: float = 0.99) -> LogitReport:
    """Logits of ``new (T, d)`` and ``shared (N, d)`` output rows over ``hidden (M, d)`` final states of a probe text.

    Raises:
        QuickmergeError: as `norm_report`.
    """
    new, shared = _checked(new, shared, quantile)
    if hidden.ndim != 2 or hidden.shape[1] != new.shape[1] or not len(hidden):
        raise QuickmergeError(f"hidden must be (M, {new.shape[1]}), M at least 1, got {tuple(hidden.shape)}")
    hidden = hidden.detach().to(new.dtype)
    own, theirs = _logits(hidden, new), _logits(hidden, shared)
    high = _quantile(theirs.largest, quantile)
    order = own.largest.argsort(descending=True)
    return LogitReport(
        shared_mean=theirs.mean,
        shared_spread=theirs.spread,
        new_mean=own.mean,
        new_spread=own.spread,
        high=high,
        loud=order[own.largest[order] > high],
        loudest=float(own.largest.max()),
        share_won=float((own.winner > theirs.winner).double().mean()),
    )


@dataclass(frozen=True)
class _Logits:
    """Mean and spread over all, the largest of each row ``(T,)`` and of each state ``(M,)``."""

    mean: float
    spread: float
    largest: Tensor
    winner: Tensor


def _logits(hidden: Tensor, rows: Tensor) -> _Logits:
    largest, winner = [], torch.full((len(hidden),), -torch.inf, dtype=rows.dtype)
    total = squares = 0.0
    for part in torch.split(rows, CHUNK):
        logits = hidden @ part.T
        largest.append(logits.amax(0))
        winner = torch.maximum(winner, logits.amax(1))
        total += float(logits.double().sum())
        squares += float(logits.double().square().sum())
    count = len(hidden) * len(rows)
    mean = total / count
    return _Logits(mean, max(0.0, squares / count - mean**2) ** 0.5, torch.cat(largest), winner)


def _quantile(x: Tensor, q: float) -> float:
    # torch.quantile refuses more than 16 million; a vocabulary has fewer rows.
    return float(x.quantile(q))


def _checked(new: Tensor, shared: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    if new.ndim != 2 or shared.ndim != 2 or new.shape[1] != shared.shape[1] or not len(new) or not len(shared):
        shapes = f"{tuple(new.shape)} and {tuple(shared.shape)}"
        raise QuickmergeError(f"new and shared must be (T, d) and (N, d), T and N at least 1, got {shapes}")
    if not 0.5 <= quantile < 1:
        raise QuickmergeError(f"quantile must be at least 0.5 and below 1, got {quantile!r}")
    for name, x in (("new", new), ("shared", shared)):
        if not bool(torch.isfinite(x).all()):
            raise QuickmergeError(f"{name} must hold finite numbers, got infinite ones or NaN")
    dtype = torch.promote_types(at_least_float32(new).dtype, at_least_float32(shared).dtype)
    return new.detach().to(dtype), shared.detach().to(dtype)
