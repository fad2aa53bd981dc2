"""Context recovery: how much of what a context is worth survives its reduction.

For the same target tokens, ``recovery = (none - reduced) / (none - full)``, where each term is the negative
log-likelihood of the continuation without context, with the reduced context and with all of it. 1 is as good as the
full context, 0 as bad as none; above 1 and below 0 are possible.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from quickmerge.evaluation.documents import Document
from quickmerge.models.compat import cache_argument


@dataclass(frozen=True)
class Recovery:
    """Recovery over documents with a bootstrap interval, and the mean NLLs (nats per token) it comes from."""

    recovery: float
    low: float
    high: float
    nll: float
    nll_full: float
    nll_none: float


def continuation_nll(model: Any, context: Tensor | None, target: Tensor, run: AbstractContextManager[Any]) -> Tensor:
    """NLL in nats of ``target[1:]`` after ``context`` (or after nothing), per token, in float32.

    The context is read first, into a cache; the continuation is then read in full on that cache, so the same code
    measures the model with and without a reducer. The first target token is never scored: without context nothing
    predicts it.
    """
    logp = continuation_logits(model, context, target, run).float().log_softmax(-1)
    picked: Tensor = logp.gather(-1, target[:, 1:, None].to(logp.device))
    return -picked.flatten()


def continuation_logits(model: Any, context: Tensor | None, target: Tensor, run: AbstractContextManager[Any]) -> Tensor:
    """``(1, M-1, V)`` logits for ``target[1:]``, read as `continuation_nll` says."""
    with torch.inference_mode(), run:
        cache = None
        if context is not None:
            cache = DynamicCache(config=model.config)
            model(context.to(model.device), **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        logits: Tensor = model(
            target[:, :-1].to(model.device), **cache_argument(model, cache), use_cache=cache is not None
        ).logits
    return logits


def document_nll(model: Any, document: Document, run: AbstractContextManager[Any] | None = None) -> Tensor:
    """Per-token NLL of a document's continuation, its context read inside ``run`` (None: read in full)."""
    return continuation_nll(model, document.context, document.target, run or nullcontext())


def recovery(
    nll: Sequence[float], full: Sequence[float], none: Sequence[float], *, resamples: int = 2000, seed: int = 0
) -> Recovery:
    """Recovery from one mean NLL per document and condition: the ratio of the summed differences.

    The ratio of sums weighs a document by what its context is worth, so one whose context says little can't swing
    the figure. The interval is the 2.5 to 97.5 percentile over documents drawn with replacement.

    Raises:
        ValueError: if there is no document or the full context is worth nothing over all of them.
    """
    reduced, whole, bare = (np.asarray(x, dtype=np.float64) for x in (nll, full, none))
    if not len(reduced) or not len(reduced) == len(whole) == len(bare):
        raise ValueError(f"nll, full and none must have one value per document, got {len(reduced)}, {len(whole)}")
    gain, worth = bare - reduced, bare - whole
    if worth.sum() <= 0:
        raise ValueError("full context must predict the continuation better than none, got a gain of "
                         f"{worth.sum():.3f} nats over {len(worth)} documents")  # fmt: skip
    low, high = bootstrap(gain, worth, resamples=resamples, seed=seed)
    return Recovery(
        float(gain.sum() / worth.sum()), low, high, float(reduced.mean()), float(whole.mean()), float(bare.mean())
    )


def bootstrap(
    top: np.ndarray[Any, Any], bottom: np.ndarray[Any, Any], *, resamples: int, seed: int
) -> tuple[float, float]:
    """95 % percentile interval of ``sum(top) / sum(bottom)`` over documents drawn with replacement."""
    draw = np.random.default_rng(seed).integers(0, len(top), (resamples, len(top)))
    below = bottom[draw].sum(1)
    ratio = top[draw].sum(1)[below > 0] / below[below > 0]
    low, high = np.percentile(ratio, [2.5, 97.5])
    return float(low), float(high)
