"""Recipes beside one another and the plain model: what of a document survives, and what reading and writing cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from quickmerge.bench.harness import Arm, Result, interleave, now
from quickmerge.bench.literals import LITERALS, Probe, kept, known_beside, probes, repeats
from quickmerge.bench.quality import continuation_nll, recovery
from quickmerge.bench.report import Report, Section
from quickmerge.bench.stats import spread
from quickmerge.bench.table import Column, Table, interval, number, text
from quickmerge.datasets.text import Document
from quickmerge.errors import QuickmergeError
from quickmerge.merge.run import cache_bytes, observe
from quickmerge.models.compat import cache_argument, returned_cache
from quickmerge.recipe.recipe import Recipe, apply

__all__ = ["PLAIN", "bench_recipes", "recipes_report"]

Row = dict[str, Any]

PLAIN = Arm("plain")
"""The model alone."""

PIECE = 64
"""Tokens of a continuation that are read at once: few enough that multipole attention reads clusters for them."""

WARM = 4
"""Tokens that every way writes once, unmeasured: the first time pays for allocation, and for timing the model."""


def bench_recipes(
    model: Any,
    documents: Sequence[Document],
    recipes: Mapping[str, Recipe],
    *,
    max_new_tokens: int = 64,
    literals: int = 0,
    tokenizer: Any = None,
    advance: Callable[[str], None] = lambda _: None,
) -> Result:
    """Measure recipes and the model alone on the same documents, in turns.

    Of each document the context is read, once to score the real continuation, and once more to write on from it,
    greedily.

    Args:
        model: a causal LM in eval mode.
        documents: what to measure on, see `quickmerge.datasets.text.split_document`.
        recipes: by what tables call them; none may be called ``plain``.
        max_new_tokens: of what is written, at least 2.
        literals: of how many literals of each document it is measured whether they can still be repeated, see
            `quickmerge.bench.literals`; 0 for none.
        tokenizer: of the documents, where there are ``literals``.
        advance: called with a label before each measurement, for progress.

    Returns:
        A row for each way, the model alone first, each with the recipe that makes it again; and a record for each
        document and way.

    Raises:
        QuickmergeError: there is no document or recipe, two have one name, or a recipe does not fit the model.
    """
    if not documents or not recipes or PLAIN.name in recipes:
        what = "documents" if not documents else "recipes"
        raise QuickmergeError(f"{what} must be at least one, and no recipe called {PLAIN.name}, got {list(recipes)}")
    arms = [PLAIN, *(Arm(name, partial(apply, model, recipe)) for name, recipe in recipes.items())]
    eos = getattr(model.generation_config, "eos_token_id", None)
    pad = eos[0] if isinstance(eos, list) else eos

    asked: dict[str, tuple[list[Probe], list[Probe]]] = {}
    for document in documents if literals else ():
        every = probes(tokenizer, document.context, most=literals)
        asked[document.name] = every, known_beside(every, repeats(model, document.context, every))

    def wrote(arm: Arm, document: Document, tokens: int) -> Row:
        return _write(model, arm.context(), document.context, tokens, 0 if pad is None else pad)

    def measured(arm: Arm, document: Document, number: int) -> Row:
        advance(f"{document.name}: {arm.name}")
        nll = _score(model, arm.context(), document)
        more: Row = {}
        if literals:
            every, known = asked[document.name]
            more["literals_kept"] = sum(repeats(model, document.context, known, arm.context()))
            more |= {"literals_known": len(known), "literals_asked": len(every)}
        return {**more, "document": document.name, "kind": document.kind, "recipe_name": arm.name, "nll": nll,
                **wrote(arm, document, max_new_tokens)}  # fmt: skip

    found = interleave(arms, documents, measured, warm_up=lambda arm, document, _: wrote(arm, document, WARM))
    records: list[Row] = []
    for place, document in enumerate(documents):
        own = found[0][place]
        with torch.inference_mode():
            none = float(continuation_nll(model, document.nothing, document.target, observe(model)).mean())
        for mine in (each[place] for each in found):
            ids = mine.pop("ids") if mine is not own else mine["ids"]
            records.append({**mine, "nll_full": own["nll"], "nll_none": none, "same": ids == own["ids"]})
    for record in records:
        record.pop("ids", None)
    return Result([_row(records, arm.name, recipes.get(arm.name)) for arm in arms], records)


def _score(model: Any, run: AbstractContextManager[Any], document: Document) -> float:
    """Mean NLL in nats of the continuation behind its first token, read in pieces on the cache of the context."""
    target = document.target.to(model.device)
    logits: list[Tensor] = []
    with torch.inference_mode(), run:
        cache = DynamicCache(config=model.config)
        model(document.context.to(model.device), **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        for piece in torch.split(target[:, :-1], PIECE, 1):
            logits.append(model(piece, **cache_argument(model, cache), use_cache=True).logits)
    logp = torch.cat(logits, 1).float().log_softmax(-1)
    return -float(logp.gather(-1, target[:, 1:, None]).mean())


def _write(model: Any, run: AbstractContextManager[Any], context: Tensor, tokens: int, pad: int) -> Row:
    """Write on from a context: the tokens, passes of the model, seconds to the first token and to the last."""
    ids = context.to(model.device)
    passes, first = 0, 0.0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    def stop(ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal first
        first = first or now(model.device) - began
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    hook = model.base_model.register_forward_hook(count)
    try:
        with torch.inference_mode(), run as inside:
            began = now(model.device)
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
                pad_token_id=pad, stopping_criteria=[stop], return_dict_in_generate=True,
            )  # fmt: skip
            seconds = now(model.device) - began
    finally:
        hook.remove()
    once = behind = 0.0
    if inside is not None and "decoding" in inside.summary():
        drafted = inside.summary()["decoding"]
        once, behind = drafted.measure_seconds, drafted.measure_behind_seconds
        passes = 1 + drafted.passes  # those that were timed, and one that fits the cache for a further turn, are not
    new = out.sequences[0, ids.shape[1] :].tolist()
    return {
        "ids": new, "tokens": len(new), "passes": passes, "ttft_seconds": first - (once - behind),
        "seconds": seconds - once, "cache_bytes": cache_bytes(returned_cache(out)),
    }  # fmt: skip


def _row(records: Sequence[Row], name: str, recipe: Recipe | None) -> Row:
    mine = [r for r in records if r["recipe_name"] == name]
    own = {r["document"]: r for r in records if r["recipe_name"] == PLAIN.name}
    found = recovery([r["nll"] for r in mine], [r["nll_full"] for r in mine], [r["nll_none"] for r in mine])
    passes, tokens = sum(r["passes"] - 1 for r in mine), sum(r["tokens"] - 1 for r in mine)
    return {
        "name": name, "label": "nothing" if recipe is None else recipe.label,
        "recipe": None if recipe is None else recipe.as_dict(), "documents": len(mine),
        "recovery": found.recovery, "recovery_low": found.low, "recovery_high": found.high, "nll": found.nll,
        "ttft_seconds": median(r["ttft_seconds"] for r in mine),
        **spread("ttft_speedup", [own[r["document"]]["ttft_seconds"] / r["ttft_seconds"] for r in mine]),
        **spread("token_speedup", [_pace(own[r["document"]]) / _pace(r) for r in mine]),
        "token_seconds": median(_pace(r) for r in mine),
        "tokens_per_pass": tokens / passes if passes else 1.0,
        "cache_ratio": sum(r["cache_bytes"] for r in mine) / sum(own[r["document"]]["cache_bytes"] for r in mine),
        "same": sum(r["same"] for r in mine), **kept(mine),
    }  # fmt: skip


def _pace(record: Row) -> float:
    """Seconds for each token behind the first."""
    return float((record["seconds"] - record["ttft_seconds"]) / max(1, record["tokens"] - 1))


# For readers.


COLUMNS = (
    Column("recipe", text("name"), "l"),
    Column("recovery", interval("recovery", ".0f", scale=100, unit=" %"),
           short=number("recovery", ".0f", scale=100, unit=" %")),
    Column("first token", number("ttft_speedup", ".2f", unit="x")),
    Column("next tokens", number("token_speedup", ".2f", unit="x")),
    Column("tokens per pass", number("tokens_per_pass", ".2f")),
    Column("cache", number("cache_ratio", ".0f", scale=100, unit=" %")),
    Column("same text", lambda r: f"{r['same']} of {r['documents']}"),
    *LITERALS,
)  # fmt: skip
_METHOD = (
    "Every way reads the same contexts. Recovery is the share of the improvement from reading a document that is left: "
    "100 % is as good as the plain model, 0 % as if the document had not been read. It is measured on the real "
    "continuation, read in pieces on the cache of the context; intervals are 95 % bootstrap over documents.",
    "First token is the plain model's time from the call of generate to the first token over the recipe's, and next "
    "tokens the same for each token behind it: medians over documents. Ways took turns, in another order for each.",
    "Tokens per pass counts what a pass of the model behind the prompt's gives. Cache is what is held at the end, as a "
    "share of the plain model's. Same text counts documents from which the recipe writes on as the plain model does.",
)


def recipes_report(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> Report:
    """The report of these rows and of what was measured."""
    labels = [Column("recipe", text("name"), "l"), Column("what it does", text("label"), "l")]
    sections = [
        Section("What survives, for what it costs", Table(COLUMNS, rows)),
        Section("What each recipe does", Table(labels, rows), printed=False),
    ]
    return Report(f"{meta['model']}: recipes beside the plain model", sections, _METHOD, meta)
