"""What a model loses and gains by its dtype: float32, bfloat16 and int8 (benchmarks/results/precision.json).

    python benchmarks/documents.py && python benchmarks/precision.py [--documents FOLDER] [--limit 6]

SmolLM2-135M-Instruct as `quickmerge.load` gives it in float32, bfloat16 and int8 (torchao's weight-only), and in
torch's dynamic int8, whose activations are in eight bits too. Seconds are medians of turns that all forms take one
after the other: a decoding step, a pass over four tokens as drafts need it, and a piece of a prompt, behind a context.
Recovery of QuickMerge at a share is against the form's own NLL with all of the context and with none; what a form
itself costs is in its own NLL. Exact match is of the first tokens that each writes greedily behind every context,
held against float32.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import quickmerge as qm
from quickmerge.bench.harness import environment, interleave, seconds_of
from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.bench.stats import quartiles
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.text import Document, split_document
from quickmerge.models import cache_folder
from quickmerge.models.compat import cache_argument, fresh_cache
from quickmerge.sampling import evenly

HERE = Path(__file__).parent
MODEL, KEEP = "smollm2-135m", 0.42
CONTEXT, TARGET, NEW = 512, 64, 16
FORMS = ("float32", "bfloat16", "int8", "int8, dynamic")
PASSES = {"step": 1, "four": 4, "piece": 128}
"""Tokens of the passes that are timed."""
Row = dict[str, Any]


def comes_as(form: str) -> tuple[Any, Any]:
    """The model in one of its forms, and its tokenizer."""
    if form != "int8, dynamic":
        return qm.load(MODEL, dtype=form)
    model, tokenizer = qm.load(MODEL)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8), tokenizer


def pass_seconds(model: Any, context: Tensor, tokens: int) -> float:
    """Seconds of a pass over so many tokens behind a context ``(1, N)``."""
    cache = fresh_cache(model)
    with torch.inference_mode():
        model(input_ids=context, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        more = context[:, :tokens]
        return seconds_of(lambda: model(input_ids=more, **cache_argument(model, cache), use_cache=True))


def read(model: Any, tokenizer: Any, document: Document) -> Row:
    """What a form makes of a document."""
    full = float(document_nll(model, document).mean())
    none = float(continuation_nll(model, document.nothing, document.target, nullcontext()).mean())
    run = qm.reduce(model, qm.QuickMerge(keep=KEEP), min_tokens=0, tokenizer=tokenizer)
    nll = float(document_nll(model, document, run).mean())
    with torch.inference_mode():
        ids = model.generate(document.context, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return {"nll": nll, "nll_full": full, "nll_none": none, "ids": ids[0, -NEW:].tolist()}


def rows_of(records: Sequence[Row], seconds: dict[str, dict[str, list[float]]]) -> list[Row]:
    """A row for each form."""
    plain = {r["document"]: r["ids"] for r in records if r["form"] == FORMS[0]}
    rows = []
    for form in FORMS:
        mine = [r for r in records if r["form"] == form]
        score = recovery([r["nll"] for r in mine], [r["nll_full"] for r in mine], [r["nll_none"] for r in mine])
        same = [r["ids"] == plain[r["document"]] for r in mine]
        begun = [sum(a == b for a, b in zip(r["ids"], plain[r["document"]], strict=True)) for r in mine]
        row: Row = {
            "form": form, "documents": len(mine), "keep": KEEP, "recovery": score.recovery,
            "recovery_low": score.low, "recovery_high": score.high, "nll_full": score.nll_full,
            "same": sum(same), "same_tokens": sum(begun) / (NEW * len(mine)),
        }  # fmt: skip
        for name in PASSES:
            ratios = [a / b for a, b in zip(seconds[FORMS[0]][name], seconds[form][name], strict=True)]
            low, mid, high = quartiles(ratios)
            row |= {f"{name}_seconds": median(seconds[form][name]), f"{name}_speedup": mid,
                    f"{name}_speedup_q1": low, f"{name}_speedup_q3": high}  # fmt: skip
        rows.append(row)
    return rows


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="folder of held-out texts; default: the cache folder's")
    parser.add_argument("--limit", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "precision.json")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    folder = args.documents or cache_folder(None) / "documents" / "test"
    models = {form: comes_as(form) for form in FORMS}
    tokenizer = models[FORMS[0]][1]
    documents = [
        split_document(tokenizer, path.read_text(encoding="utf-8"), path.stem, context=CONTEXT, target=TARGET)
        for path in evenly(sorted(folder.rglob("*.txt")), args.limit)
    ]
    records: list[Row] = []
    with progress() as bar:
        task = bar.add_task("reading", total=len(documents) * len(FORMS) + len(PASSES))
        seconds: dict[str, dict[str, list[float]]] = {form: {} for form in FORMS}
        for name, tokens in PASSES.items():

            def timed(form: str, context: Tensor, number: int, tokens: int = tokens) -> float:
                return pass_seconds(models[form][0], context, tokens)

            context = documents[0].context[:, :128]
            found = interleave(FORMS, [context], timed, rounds=args.rounds, warm_up=timed)
            for form, each in zip(FORMS, found, strict=True):
                seconds[form][name] = each
            bar.update(task, advance=1, description=f"passes over {tokens} tokens")
        for document in documents:
            for form in FORMS:
                bar.update(task, advance=1, description=f"{document.name}: {form}")
                records.append({"document": document.name, "form": form, **read(*models[form], document)})
    rows = rows_of(records, seconds)
    write_json(args.out, {
        "rows": rows, "records": records, "seconds": seconds,
        "meta": {"model": MODEL, "context": CONTEXT, "target": TARGET, "new": NEW, "passes": PASSES,
                 "environment": environment()},
    })  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
