"""The benchmark: every reducer at every keep on the same documents, quality and cost in one row."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from statistics import median
from typing import Any

from quickmerge.evaluation.cost import model_shape
from quickmerge.evaluation.documents import Document
from quickmerge.evaluation.recovery import continuation_nll, document_nll, recovery
from quickmerge.hosts import observe, reduce
from quickmerge.reducers.base import Reducer

Row = dict[str, Any]


def bench(
    model: Any,
    documents: Sequence[Document],
    reducers: Sequence[Reducer],
    keeps: Sequence[float],
    *,
    layer: Any = None,
    advance: Callable[[str], None] = lambda _: None,
    **settings: Any,
) -> tuple[list[Row], list[Row]]:
    """Measure recovery and cost of every reducer at every keep.

    For each document the full model is timed before and after the reduced ones, and a reducer's speed-up is taken
    against the mean of the two, so that a machine that slows down does so for both.

    Args:
        model: a supported causal LM in eval mode.
        documents: what to measure on, see `split_document`.
        reducers: one of each method; ``keep`` is replaced.
        keeps: shares to keep.
        layer: where to merge, as in `quickmerge.reduce`.
        advance: called with a label before each measurement, for progress.
        **settings: further arguments of `quickmerge.reduce`.

    Returns:
        Rows over all documents (and, if they carry more than one kind, further rows per kind), and one record per
        document and setting.
    """
    shape = model_shape(model)
    # A context is measured as long as it is.
    whatever = settings if settings.get("mode") == "block_causal" else {"min_tokens": 0, **settings}
    records: list[Row] = []
    for document in documents:
        advance(f"{document.name}: full")
        # Once unmeasured: the first pass of a new length pays for allocation.
        document_nll(model, document)
        watch = observe(model)
        full = float(document_nll(model, document, watch).mean())
        before = watch.summary().prefill_seconds
        none = float(continuation_nll(model, None, document.target, nullcontext()).mean())
        here: list[Row] = []
        for keep in keeps:
            for reducer in reducers:
                advance(f"{document.name}: {reducer.label} {keep:g}")
                run = reduce(model, replace(reducer, keep=keep), layer, **whatever)
                nll = document_nll(model, document, run)
                stats = run.summary()
                here.append({
                    "document": document.name, "kind": document.kind, "reducer": reducer.label, "keep": keep,
                    "tokens_in": stats.tokens_in, "tokens_kept": stats.tokens_kept,
                    "nll": float(nll.mean()), "nll_full": full, "nll_none": none,
                    "prefill_seconds": stats.prefill_seconds, "reducer_seconds": stats.reducer_seconds,
                    "flops_ratio": shape.flops_ratio(reducer, stats.tokens_per_layer),
                    "cache_bytes": stats.prompt_cache_bytes,
                    "cache_ratio": stats.prompt_cache_bytes / stats.prompt_cache_bytes_full,
                    "reducer_bytes": stats.reducer_bytes,
                })  # fmt: skip
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
    return rows, records


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
            "recovery": score.recovery, "recovery_low": score.low, "recovery_high": score.high, **middle,
        })  # fmt: skip
    return rows


def environment() -> dict[str, str]:
    """Versions and hardware, for every committed result."""
    import os

    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }
