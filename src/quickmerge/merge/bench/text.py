"""The benchmark: every reducer at every keep on the same documents, quality and cost in one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from quickmerge.bench.harness import Arm, Result, interleave
from quickmerge.bench.literals import kept, known_beside, probes, repeats, survives
from quickmerge.bench.pareto import Cost, pareto_chart
from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.bench.report import Report, Section
from quickmerge.bench.rows import COLUMNS, bench_verdict, by_kind, grouped, has_kind, overall, ranked
from quickmerge.datasets.text import Document
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.cost import Shape, model_shape
from quickmerge.merge.cache import Evictor, as_evictor
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.run import observe
from quickmerge.viz.format import clean, number

Row = dict[str, Any]


def bench(
    model: Any,
    documents: Sequence[Document],
    reducers: Sequence[Reducer | Evictor],
    keeps: Sequence[float],
    *,
    layer: Any = None,
    budget: Callable[[Any, float], Any] = lambda reducer, keep: replace(reducer, keep=keep),
    literals: int = 0,
    tokenizer: Any = None,
    advance: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> Result:
    """Measure recovery and cost of every reducer at every keep.

    For each document the full model is timed before and after the reduced ones, and a reducer's speed-up is taken
    against the mean of the two, so that a machine that slows down does so for both. The reducers take turns, in another
    order for each document.

    Args:
        model: a supported causal LM in eval mode.
        documents: what to measure on, see `split_document`.
        reducers: one of each method; ``keep`` is replaced. Of a method for the cache it is the share of the cache.
        keeps: shares to keep.
        layer: where to merge, as in `quickmerge.reduce`.
        budget: gives a method a share of ``keeps``. Default: as its ``keep``.
        literals: of how many literals of each document it is measured whether they can still be repeated, see
            `quickmerge.bench.literals`; 0 for none.
        tokenizer: of the documents, where there are ``literals``; or where a method or ``protect`` asks for the text.
        advance: called with a label before each measurement, for progress.
        **settings: further arguments of `quickmerge.reduce`.

    Returns:
        Rows over all documents (and, if they carry more than one kind, further rows per kind), and one record per
        document and setting.
    """
    shape = model_shape(model)
    # A context is measured as long as it is.
    whatever = settings if settings.get("mode") == "block_causal" else {"min_tokens": 0, **settings}
    if tokenizer is not None:
        whatever = {**whatever, "tokenizer": tokenizer}
    # A method for the cache asks for the text where literals stay, and for no other reason that is said here.
    unasked = ("sinks", "min_tokens", *([] if "protect" in settings else ["tokenizer"]))
    beside = {name: value for name, value in whatever.items() if name not in unasked}
    arms = [
        Arm(
            reducer.label,
            partial(reduce, model, budget(reducer, keep), None, **beside)
            if isinstance(reducer, Evictor)
            else partial(reduce, model, budget(reducer, keep), layer, **whatever),
            {"keep": keep, "reducer": reducer},
        )
        for keep in keeps
        for reducer in reducers
    ]  # fmt: skip

    def measured(arm: Arm, document: Document, number: int) -> Row:
        advance(f"{document.name}: {arm.label}")
        run: Any = arm.context()
        nll, still = survives(model, document, known, run)
        stats = run.summary()
        more: Row = {} if stats.literals is None else {"literal_tokens": stats.literals}
        if literals:
            more |= {"literals_kept": sum(still), "literals_known": len(known), "literals_asked": len(found)}
        return {
            **more, "document": document.name, "kind": document.kind, "reducer": arm.name, "keep": arm.keep,
            "tokens_in": stats.tokens_in, "tokens_kept": stats.tokens_kept,
            "nll": float(nll.mean()), "nll_full": full, "nll_none": none,
            "prefill_seconds": stats.prefill_seconds, "reducer_seconds": stats.reducer_seconds,
            "flops_ratio": _flops_ratio(shape, arm.settings["reducer"], stats.tokens_per_layer, stats.tokens_in),
            "cache_bytes": stats.prompt_cache_bytes,
            "cache_ratio": stats.prompt_cache_bytes / stats.prompt_cache_bytes_full,
            "reducer_bytes": stats.reducer_bytes,
        }  # fmt: skip

    records: list[Row] = []
    for order, document in enumerate(documents):
        advance(f"{document.name}: full")
        # Once unmeasured: the first pass of a new length pays for allocation.
        document_nll(model, document)
        watch = observe(model)
        full = float(document_nll(model, document, watch).mean())
        before = watch.summary().prefill_seconds
        none = float(continuation_nll(model, document.nothing, document.target, nullcontext()).mean())
        found = probes(tokenizer, document.context, most=literals) if literals else []
        known = known_beside(found, repeats(model, document.context, found))
        here = [record for (record,) in interleave(arms, [document], measured, first=order)]
        document_nll(model, document, watch)
        for record in here:
            record["prefill_seconds_full"] = (before + watch.summary().prefill_seconds) / 2
            record["prefill_speedup"] = record["prefill_seconds_full"] / record["prefill_seconds"]
        records += here
    rows = _rows(records, None)
    kinds = sorted({r["kind"] for r in records if r["kind"] is not None})
    if len(kinds) > 1:
        for kind in kinds:
            rows += _rows([r for r in records if r["kind"] == kind], kind)
    return Result(rows, records)


def _flops_ratio(shape: Shape, method: Reducer | Evictor, tokens: Sequence[float], given: float) -> float:
    """FLOPs of a prefill by a method, its own inside, over those of a full one."""
    evictor = method if isinstance(method, Evictor) else as_evictor(getattr(method, "cache", None))
    return shape.flops_ratio(None if isinstance(method, Evictor) else method, tokens, given, evictor)


def _rows(records: Sequence[Row], kind: str | None) -> list[Row]:
    """Average the records of each reducer and keep over documents; times are medians."""
    rows = []
    for name, keep in dict.fromkeys((r["reducer"], r["keep"]) for r in records):
        mine = [r for r in records if r["reducer"] == name and r["keep"] == keep]
        score = recovery([r["nll"] for r in mine], [r["nll_full"] for r in mine], [r["nll_none"] for r in mine])
        mean = {k: sum(r[k] for r in mine) / len(mine) for k in
                ("tokens_in", "tokens_kept", "flops_ratio", "cache_bytes", "cache_ratio", "reducer_bytes")}  # fmt: skip
        middle = {k: median(r[k] for r in mine) for k in ("prefill_seconds", "prefill_speedup", "reducer_seconds")}
        rows.append({
            "reducer": name, "keep": keep, "kind": kind, "documents": len(mine), **mean,
            "nll": score.nll, "nll_full": score.nll_full, "nll_none": score.nll_none,
            "recovery": score.recovery, "recovery_low": score.low, "recovery_high": score.high, **middle, **kept(mine),
        })  # fmt: skip
    return rows


# The report of a benchmark: every reducer at every keep value, on the same documents.


_FEW = 4  # documents that are named one by one
_METHOD = (
    "Every reducer read the same documents with the same model. NLL is the mean negative "
    "log-likelihood of the text that really follows a document, in nats per token: lower is better.",
    "Recovery is the share of the improvement from reading the document that is left after the reduction: 100% is as "
    "good as the full document, 0% no better than never having read it. Below 0% the reduced document misleads.",
    "FLOPs and cache are shares of what the full prompt takes. Prefill is the time to read the prompt, by the clock "
    "on the machine named here, with the reducer's own time in it.",
)
_FIGURES: tuple[tuple[Cost, str], ...] = (
    (
        "flops_ratio",
        "Up and to the left is better. FLOPs follow from the model and do not depend on the machine.",
    ),
    ("prefill_seconds", "The same against the clock: here a reducer also pays for its own work."),
)


def bench_report(rows: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> Report:
    """Return the report of a benchmark.

    Args:
        rows: One mapping for each reducer and keep value; rows with a ``kind`` break the same down by kind.
        meta: What to tell about the run. ``title``, ``subtitle``, ``interval`` (what the intervals are, such as "95%
            bootstrap over documents") and ``method`` (more sentences) have a place of their own; everything else,
            such as ``model``, ``hardware``, ``documents`` and ``versions``, is listed as it comes.

    Raises:
        QuickmergeError: there are no rows, or none that can be drawn.
    """
    if not rows:
        raise QuickmergeError("A benchmark report needs at least one row.")
    whole = ranked(overall(rows))
    interval = clean(meta.get("interval") or "uncertainty intervals")
    barred = any(number(row, "recovery_low") is not None for row in whole)
    bars = f" Vertical bars are {interval}." if barred else ""
    charts = [
        (pareto_chart(whole, x=cost), words + bars)
        for cost, words in _FIGURES
        if any(number(row, cost) is not None and number(row, "recovery") is not None for row in whole)
    ]
    averaged = " Rows are means over the kinds of document." if all(has_kind(row) for row in rows) else ""
    caption = f"By the share of tokens kept, best recovery first.{averaged}"
    sections = [
        Section("What survives, for what it costs", charts=charts),
        Section("Every result", grouped(COLUMNS, whole), caption),
    ]
    kinds = by_kind(rows)
    if kinds is not None:
        sections.append(Section("Recovery by kind of document", kinds, printed=False))
    told = {key: value for key, value in meta.items() if key not in ("title", "subtitle", "interval", "method")}
    subtitle = meta.get("subtitle") or " · ".join(
        filter(None, (str(meta.get("model") or ""), _names(meta.get("documents"))))
    )
    title = clean(meta.get("title") or "What each reducer keeps, and what it costs")
    notes = (*_METHOD, *_more(meta))
    return Report(title, sections, notes, told, bench_verdict(whole), clean(subtitle))


def _more(meta: Mapping[str, Any]) -> list[str]:
    method = meta.get("method")
    return [method] if isinstance(method, str) else [str(line) for line in method or ()]


def _names(documents: object) -> str:
    """Name the documents, or count them where they are many."""
    if isinstance(documents, Sequence) and not isinstance(documents, str):
        return f"{len(documents)} documents" if len(documents) > _FEW else ", ".join(map(str, documents))
    return str(documents or "")
