"""Perplexity of whole documents in block-causal mode: per original token, on the same positions for everybody."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from quickmerge.bench.stats import ratio_interval
from quickmerge.datasets.text import Document
from quickmerge.errors import QuickmergeError
from quickmerge.models.compat import cache_argument


def token_nll(model: Any, ids: Tensor, run: AbstractContextManager[Any] | None = None) -> Tensor:
    """NLL in nats of ``ids[:, 1:]``, ``(B, N - 1)``, in one pass without a cache."""
    with torch.inference_mode(), run or nullcontext():
        logits = model(ids.to(model.device), use_cache=False).logits[:, :-1]
        logp = logits.float().log_softmax(-1)
        picked: Tensor = logp.gather(-1, ids.to(model.device)[:, 1:, None])
        return -picked[..., 0]


def perplexity(model: Any, ids: Tensor, run: AbstractContextManager[Any] | None = None, skip: int = 0) -> float:
    """Exp of the mean NLL over all tokens after the first ``skip + 1``; never per merged token."""
    return float(token_nll(model, ids, run)[:, skip:].mean().exp())


# The first tokens of a text at the cost of those, however long the text is.


CHARACTERS = 16
"""Of a text are tokenised at first for each token that is wanted: enough for prose and code of any script."""
EDGE = 16
"""Tokens before a cut that may differ from those of the whole text: they are not used."""


def first_tokens(tokenizer: Any, text: str, limit: int) -> list[int]:
    """At most the first ``limit`` token ids of a text, which is tokenised no further than needed.

    Raises:
        QuickmergeError: the text has no tokens, or the tokenizer can't read it.
    """
    cut = CHARACTERS * (limit + EDGE)
    while True:
        ids: list[int] = tokenizer(text[:cut], add_special_tokens=False, verbose=False)["input_ids"]
        if cut >= len(text) or len(ids) >= limit + EDGE:
            break
        cut *= 4
    if not ids:
        raise QuickmergeError("the text must have some tokens, got none: the tokenizer drops all of it")
    return ids[:limit]


def _positions(model: Any) -> Any:
    """Tokens that a model has positions for; of a CALM, those of the chunks that its backbone has positions for."""
    backbone = getattr(model.config, "backbone", None)
    if backbone is None:
        return getattr(model.config.get_text_config(), "max_position_embeddings", None)
    chunks = getattr(backbone, "max_position_embeddings", None)
    return chunks * model.config.patch if isinstance(chunks, int) else None


def check_room(model: Any, tokenizer: Any, what: str, text: str, max_new_tokens: int) -> None:
    """Before a long text is tokenised: raise QuickmergeError if a model has too few positions for it and an answer.

    Args:
        model: whose config tells its positions; without a limit everything fits.
        tokenizer: of the model.
        what: the text, in words.
        text: all that the model is to read.
        max_new_tokens: of the answer.
    """
    limit = _positions(model)
    if not isinstance(limit, int) or len(text) <= CHARACTERS * limit:
        return
    room = max(0, limit - max_new_tokens)
    if len(first_tokens(tokenizer, text, room + 1)) > room:
        raise QuickmergeError(
            f"{what} and --max-new-tokens must fit the model's {limit} positions, "
            f"got more than {room} and {max_new_tokens} tokens"
        )


# Context recovery: how much of what a context is worth survives its reduction.
#
# For the same target tokens, ``recovery = (none - reduced) / (none - full)``, where each term is the negative
# log-likelihood of the continuation without context, with the reduced context and with all of it. 1 is as good as the
# full context, 0 as bad as none; above 1 and below 0 are possible.


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
    low, high = ratio_interval(gain, worth, resamples=resamples, seed=seed)
    return Recovery(
        float(gain.sum() / worth.sum()), low, high, float(reduced.mean()), float(whole.mean()), float(bare.mean())
    )


def check_fits(model: Any, what: str, ids: Tensor, max_new_tokens: int) -> None:
    """Raise QuickmergeError unless a model has positions for ``ids (1, N)``, made of ``what``, and an answer."""
    if not ids.numel():
        raise QuickmergeError(f"{what} must have some tokens, got none: the template or the tokenizer drops all of it")
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] + max_new_tokens > limit:
        raise QuickmergeError(
            f"{what} and --max-new-tokens must fit the model's {limit} positions, "
            f"got {ids.shape[1]} and {max_new_tokens} tokens"
        )
