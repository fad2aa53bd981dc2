"""``quickmerge demo``: one real document, read in full and with fewer tokens, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from quickmerge.console.options import (
    JSON,
    KEEP,
    LAYER,
    MODEL,
    REDUCER,
    Alone,
    check_output,
    load_writer,
    one_sentence,
    parse_layer,
    progress,
    write_json,
)
from quickmerge.errors import clean_name
from quickmerge.merge.cli.options import parse_reducer

EXAMPLE = "Example: quickmerge demo --keep 0.3 --out runs/demo.html"
ROUNDS = 3


def demo(
    model: MODEL = "smollm2-135m",
    reducer: REDUCER = "quickmerge",
    keep: KEEP = 0.42,
    layer: LAYER = None,
    out: Annotated[Path, typer.Option("--out", help="Where to write the report.")] = Path("runs/demo.html"),
    json: JSON = None,
) -> None:
    """Answer a question about the shipped document with all tokens and with fewer, and write a report."""
    from quickmerge.data import demo_document, demo_question
    from quickmerge.merge.bench.answer import answer
    from quickmerge.merge.demo import demo_report
    from quickmerge.terminal import Terminal
    from quickmerge.viz.page import write_page

    check_output(json, out)
    method, depth = parse_reducer(reducer, keep), parse_layer(layer)
    console = Terminal()
    lm, tokenizer = load_writer(model)
    document, question = demo_document(), demo_question()
    with progress() as bar, one_sentence(Alone.writing(lm, tokenizer)):
        task = bar.add_task("warming up", total=2 * ROUNDS + 4)
        # The first pass of a process pays for allocation and threads; it is not measured.
        answer(lm, tokenizer, document, question["question"], None, max_new_tokens=2)
        found: dict[str, list[Any]] = {"full": [], "reduced": []}
        for round_ in range(1, ROUNDS + 1):
            for name, way in (("full", None), ("reduced", method)):
                bar.update(task, advance=1, description=f"answering, {name} ({round_} of {ROUNDS})")
                found[name].append(answer(lm, tokenizer, document, question["question"], way, depth, max_new_tokens=48))
        quality = _quality(
            lm, tokenizer, document, method, depth, lambda text: bar.update(task, advance=1, description=text)
        )
    data = _gather(model, document, question["question"], method, found, quality, lm, tokenizer)
    _print(console, data, question["answer"])
    write_page(out, demo_report(data))
    console.print(f"\nThe report, with every token of the document: {clean_name(out.absolute())}", soft_wrap=True)
    write_json(json, {k: v for k, v in data.items() if k != "cells"})


def _quality(lm: Any, tokenizer: Any, document: str, method: Any, depth: Any, say: Any) -> dict[str, float]:
    """How well the document's last 192 tokens are predicted from all that comes before them, reduced or not."""
    from contextlib import nullcontext

    from quickmerge.bench.quality import continuation_nll, document_nll
    from quickmerge.datasets.text import split_document
    from quickmerge.merge.attach import reduce

    piece = split_document(tokenizer, document, "the demo document", context=10**6)
    say("predicting the end of the document: with all tokens")
    full = float(document_nll(lm, piece).mean())
    say("predicting the end of the document: with fewer tokens")
    reduced = float(document_nll(lm, piece, reduce(lm, method, depth, min_tokens=0)).mean())
    say("predicting the end of the document: with nothing before it")
    none = float(continuation_nll(lm, piece.nothing, piece.target, nullcontext()).mean())
    return {"full": full, "reduced": reduced, "none": none, "recovery": (none - reduced) / (none - full)}


def _gather(
    model: str, document: str, question: str, method: Any, found: dict[str, list[Any]], quality: dict[str, float],
    lm: Any, tokenizer: Any,
) -> dict[str, Any]:  # fmt: skip
    from statistics import median

    from quickmerge.bench.harness import environment
    from quickmerge.merge.bench.cost import model_shape
    from quickmerge.merge.collect import plan_cells
    from quickmerge.models import MODELS

    sides = {}
    for name, answers in found.items():
        last = answers[-1]
        sides[name] = {
            "answer": last.text,
            "prefill_seconds": median(a.stats.prefill_seconds for a in answers),
            "reducer_seconds": median(a.stats.reducer_seconds for a in answers),
            "ttft_seconds": median(a.ttft_seconds for a in answers),
            "decode_seconds_per_token": median(a.stats.decode_seconds_per_token for a in answers),
            "cache_bytes": last.stats.prompt_cache_bytes,
            "tokens_per_layer": last.stats.tokens_per_layer,
            "nll": quality[name],
        }
    last = found["reduced"][-1]
    shape, stats = model_shape(lm), last.stats
    versions = environment()
    hardware = versions.pop("cpu") + (f", {versions['gpu']}" if versions["gpu"] != "none" else "")
    tokens = stats.tokens_per_layer
    first = next((i for i, n in enumerate(tokens) if n < stats.tokens_in), len(tokens))
    return {
        "model": MODELS.get(model, model),
        "document_name": document.strip().splitlines()[0],
        "question": question,
        "reducer": method.label,
        "settings": repr(method),
        "keep": method.keep,
        "layer": first,
        **sides,
        "nll_none": quality["none"],
        "recovery": quality["recovery"],
        "flops_ratio": shape.flops_ratio(method, stats.tokens_per_layer, stats.tokens_in),
        "tokens_in": stats.tokens_in,
        "tokens_kept": round(stats.tokens_kept),
        "cells": plan_cells(tokenizer, last.ids[0].cpu(), last.plan) if last.plan is not None else [],
        "answer_tokens": stats.decode_steps + 1,
        "method": [f"Seconds are medians of {ROUNDS} runs of each kind in turn, after one that was not counted."],
        "hardware": hardware,
        "versions": versions,
    }  # fmt: skip


def _print(console: Any, data: dict[str, Any], expected: str) -> None:
    from rich.table import Table

    from quickmerge.merge.run import layer_runs

    full, reduced = data["full"], data["reduced"]
    read = f"{data['tokens_in']:.0f} tokens, read by {clean_name(data['model'])}."
    console.print(f"\n{data['document_name']}, {read}")
    console.print(f"Question: {data['question']}  (in the document: {expected})\n")
    table = Table("", "all tokens", f"{data['reducer']}, keep {data['keep']:g}", "ratio")
    table.add_row("answer", full["answer"], reduced["answer"], "")
    for first, last, n in layer_runs(reduced["tokens_per_layer"]):
        table.add_row(f"tokens read in layers {first}-{last}", f"{data['tokens_in']:.0f}", f"{n:.0f}",
                      f"{n / data['tokens_in']:.2f}")  # fmt: skip

    def line(label: str, key: str, scale: float, unit: str) -> None:
        a, b = full[key] * scale, reduced[key] * scale
        table.add_row(label, f"{a:.2f} {unit}", f"{b:.2f} {unit}", f"{b / a:.2f}" if a else "")

    line("prefill", "prefill_seconds", 1, "s")
    table.add_row("  of which the reducer", "", f"{reduced['reducer_seconds']:.3f} s", "")
    line("time to first token", "ttft_seconds", 1, "s")
    line("decode per token", "decode_seconds_per_token", 1e3, "ms")
    line("cache after the prompt", "cache_bytes", 2**-20, "MiB")
    table.add_row("prefill FLOPs", "1", f"{data['flops_ratio']:.2f}", f"{data['flops_ratio']:.2f}")
    table.add_row("NLL at the document's end (nats per token)", f"{full['nll']:.3f}", f"{reduced['nll']:.3f}",
                  f"without the document: {data['nll_none']:.3f}")  # fmt: skip
    console.print(table)
    console.print(
        f"Recovery: {100 * data['recovery']:.1f} % of what reading the document is worth for predicting its end is "
        "still there after the reduction (100 % = as good as all tokens, 0 % = as good as none)."
    )
