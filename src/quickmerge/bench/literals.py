"""Literals kept: of the numbers, names and paths of a document, how many a model can still repeat.

Of a document some literals are drawn (see `quickmerge.models.literals`). Behind the document its text begins again a
few words in front of one: who still knows the document goes on with that literal. It counts as repeated if greedy
decoding would write every token of it, and of these only the ones that the plain model repeats can be lost:
``literals kept = repeated by both / repeated by the plain model``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from quickmerge.bench.stats import ratio_interval
from quickmerge.bench.table import Column, interval, number
from quickmerge.datasets.text import Document
from quickmerge.models.compat import cache_argument
from quickmerge.models.literals import literal_tokens
from quickmerge.models.spans import pieces_of

__all__ = ["LEAD", "LITERALS", "Probe", "kept", "known_beside", "literal_share", "probes", "repeats", "survives"]

LEAD = 16
"""Tokens in front of a literal that are read again, at least."""

MARGIN = 32
"""Tokens at the end of a document of which no literal is drawn: they stay anyway, or nearly."""

LONGEST = 16
"""Tokens of a literal at most. In front of shorter ones more is read, so that all can be asked at once."""

CUE = "\n…"
"""Behind the document, in front of what is read again."""


@dataclass(frozen=True)
class Probe:
    """A literal that is asked for: the token ids that are read behind the document, and those of the literal."""

    lead: tuple[int, ...]
    answer: tuple[int, ...]


def probes(tokenizer: Any, context: Tensor, *, most: int = 8, seed: int = 0) -> list[Probe]:
    """At most ``most`` different literals of a document ``(1, N)``, drawn by ``seed``, in the order of the text."""
    ids: list[int] = context[0].tolist()
    owners = literal_tokens(pieces_of(ids, tokenizer))
    cue = tuple(tokenizer(CUE, add_special_tokens=False, verbose=False)["input_ids"])
    found: dict[tuple[int, ...], Probe] = {}
    start = 0
    while start < len(ids):
        stop = start + 1
        while stop < len(ids) and owners[stop] == owners[start]:
            stop += 1
        answer = tuple(ids[start:stop])
        lead = LEAD + LONGEST - len(answer)
        if owners[start] >= 0 and start >= lead and stop <= len(ids) - MARGIN and len(answer) <= LONGEST:
            found.setdefault(answer, Probe(cue + tuple(ids[start - lead : start]), answer))
        start = stop
    every = list(found.values())
    chosen = sorted(random.Random(seed).sample(range(len(every)), min(most, len(every))))
    return [every[i] for i in chosen]


def literal_share(tokenizer: Any, context: Tensor) -> float:
    """The share of the tokens of a document ``(1, N)`` that are of literals."""
    owners = literal_tokens(pieces_of(context[0].tolist(), tokenizer))
    return sum(owner >= 0 for owner in owners) / len(owners)


def repeats(
    model: Any, context: Tensor, asked: Sequence[Probe], run: AbstractContextManager[Any] | None = None
) -> list[bool]:
    """Which literals of a document ``(1, N)``, which is read once inside ``run``, greedy decoding would write.

    All are asked at once, each in a row of its own behind what was read. That a token is the first choice is looked up
    where the right ones before it were read: then, and only then, greedy decoding would write all of them.
    """
    if not asked:
        return []
    with torch.inference_mode(), run or nullcontext():
        return _asked(model, _read(model, context), asked)


def survives(
    model: Any, document: Document, asked: Sequence[Probe], run: AbstractContextManager[Any] | None = None
) -> tuple[Tensor, list[bool]]:
    """Per-token NLL of a document's continuation, as `quickmerge.bench.quality.document_nll`, and `repeats`.

    The context is read once for both.
    """
    with torch.inference_mode(), run or nullcontext():
        cache = _read(model, document.context)
        own = deepcopy(cache) if asked else cache
        target = document.target.to(model.device)
        logits = model(target[:, :-1], **cache_argument(model, own), use_cache=True).logits
        nll: Tensor = -logits.float().log_softmax(-1).gather(-1, target[:, 1:, None]).flatten()
        return nll, _asked(model, cache, asked) if asked else []


def _read(model: Any, context: Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    model(context.to(model.device), **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    return cache


def _asked(model: Any, cache: DynamicCache, asked: Sequence[Probe]) -> list[bool]:
    """Read every probe in a row of its own behind the cache of one text, which is used up."""
    cache.batch_repeat_interleave(len(asked))
    rows = torch.tensor([[*probe.lead, *probe.answer[:-1]] for probe in asked], device=model.device)
    first = model(rows, **cache_argument(model, cache), use_cache=True).logits.argmax(-1).tolist()
    return [
        row[-len(probe.answer) :] == list(probe.answer) for row, probe in zip(first, asked, strict=True)
    ]  # fmt: skip


def known_beside(asked: Sequence[Probe], plain: Sequence[bool]) -> list[Probe]:
    """The literals that the plain model repeats, the only ones that can be lost."""
    return [probe for probe, known in zip(asked, plain, strict=True) if known]


def kept(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a row holds of literals, of records with ``literals_kept``, ``literals_known`` and ``literals_asked``.

    The share of those that the plain model repeats with its interval over documents, None where it repeats none; and
    how many literals were asked for and known, which is the plain model's own share.
    """
    if not any("literals_known" in record for record in records):
        return {}
    hits, tries = ([record[name] for record in records] for name in ("literals_kept", "literals_known"))
    known = {"literals_known": sum(tries), "literals_asked": sum(record["literals_asked"] for record in records)}
    if not known["literals_known"]:
        return {"literals_kept": None, "literals_kept_low": None, "literals_kept_high": None, **known}
    low, high = ratio_interval(hits, tries)
    return {"literals_kept": sum(hits) / sum(tries), "literals_kept_low": low, "literals_kept_high": high, **known}


def _any(rows: Sequence[Mapping[str, Any]]) -> bool:
    return any("literals_known" in row for row in rows)


_PERCENT: dict[str, Any] = {"scale": 100, "unit": " %"}
LITERALS = (
    Column("literals kept", interval("literals_kept", ".0f", **_PERCENT),
           short=number("literals_kept", ".0f", **_PERCENT), when=_any),
    Column("plain model", lambda row: f"{row['literals_known']} of {row['literals_asked']}", when=_any, spare=True),
)  # fmt: skip
"""The columns of a table: the share kept, and how many of the literals the plain model repeats."""
