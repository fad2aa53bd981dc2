"""What it costs and what it keeps to leave literals alone, on the documents of budgets.py.

    python benchmarks/documents.py && python benchmarks/literals.py

Recovery, literals kept, FLOPs, cache and seconds of the prefill, with and without ``protect="literals"``, at two
shares; and a larger share without it, which spends about as much on everything alike. On as many of the held-out
documents of each kind as ``--each`` says, in the precision that ``--dtype`` does. Every measurement is written down as
it comes, so that a run goes on where it was stopped, and ``--measured`` writes what there is by then. Writes
benchmarks/results/literals.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import Any

import torch
from budgets import CONTEXT, TARGET, _document, _some
from rich.console import Console

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.bench.literals import kept, known_beside, literal_share, probes, repeats, survives
from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.bench.records import Records
from quickmerge.bench.stats import ratio_interval
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.run import observe
from quickmerge.models import cache_folder, load

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
ASKED = 8
"""Literals of each document."""


def ways() -> dict[str, qm.Recipe]:
    """What is compared, by what the table calls it."""

    def text(keep: float, protect: str | None = None) -> qm.Recipe:
        return qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=keep), mode=qm.Prefix(min_tokens=0, protect=protect)))

    return {
        "keep 0.42": text(0.42), "keep 0.42, literals": text(0.42, "literals"),
        "keep 0.2": text(0.2), "keep 0.2, literals": text(0.2, "literals"),
        "keep 0.6": text(0.6),
    }  # fmt: skip


def measure(args: argparse.Namespace) -> None:
    """Every way on every document, in turns, the plain model before and after them; then the rows."""
    model, tokenizer = load("smollm2-135m", dtype=getattr(torch, args.dtype))
    shape = model_shape(model)
    folder = (args.documents or cache_folder(None) / "documents") / "test"
    documents = _some([_document(tokenizer, path) for path in sorted(folder.rglob("*.txt"))], args.each)
    recipes = ways()
    settings = {"model": "smollm2-135m", "context": CONTEXT, "target": TARGET, "dtype": args.dtype, "asked": ASKED}
    records = Records(args.work / "literals.jsonl", settings, ("document", "way"))
    with progress() as bar:
        task = bar.add_task("literals", total=len(documents) * len(recipes))
        for turn, document in enumerate([] if args.measured else documents):
            names = list(recipes)
            names = names[turn % len(names) :] + names[: turn % len(names)]
            todo = [name for name in names if records.get(document.name, name) is None]
            bar.update(task, advance=len(names) - len(todo))
            if not todo:
                continue
            every = probes(tokenizer, document.context, most=ASKED)
            known = known_beside(every, repeats(model, document.context, every))  # which pays for allocation, too
            watch = observe(model)
            full = float(document_nll(model, document, watch).mean())
            seconds = [watch.summary().prefill_seconds]
            none = float(continuation_nll(model, document.nothing, document.target, observe(model)).mean())
            found: list[Row] = []
            for name in todo:
                recipe = recipes[name]
                run = qm.apply(model, recipe)
                scored, still = survives(model, document, known, run)
                (stats,) = run.summary().of.values()
                reducer = recipe.merge.reducer if isinstance(recipe.merge, qm.Merge) else None
                found.append({
                    "document": document.name, "kind": document.kind, "way": name, "nll": float(scored.mean()),
                    "nll_full": full,
                    "nll_none": none, "seconds": stats.prefill_seconds, "literal_tokens": stats.literals,
                    "flops_ratio": shape.flops_ratio(
                        reducer, stats.tokens_per_layer, stats.tokens_in, recipe.evictor),
                    "cache_ratio": stats.prompt_cache_bytes / stats.prompt_cache_bytes_full,
                    "literal_share": literal_share(tokenizer, document.context),
                    "literals_kept": sum(still),
                    "literals_known": len(known), "literals_asked": len(every),
                })  # fmt: skip
                bar.update(task, advance=1, description=f"{document.name}: {name}")
            document_nll(model, document, watch)
            seconds.append(watch.summary().prefill_seconds)
            for each in found:
                records.add({**each, "seconds_full": sum(seconds) / 2})
    documents = [d for d in documents if all(records.get(d.name, name) for name in recipes)]
    kinds: list[str | None] = [None, *sorted({str(d.kind) for d in documents})]
    rows = [_row(records, documents, name, recipe, kind) for kind in kinds for name, recipe in recipes.items()]
    told = {"environment": environment(), **settings, "documents": len(documents)}
    each_one = [records.get(d.name, name) for d in documents for name in recipes]
    write_json(RESULTS / "literals.json", {"rows": [r for r in rows if r], "documents_measured": each_one, **told})


def _row(records: Records, documents: Any, name: str, recipe: qm.Recipe, kind: str | None) -> Row:
    those = [d for d in documents if kind in (None, d.kind)]
    mine = [records.get(d.name, name) or {} for d in those]
    score = recovery([r["nll"] for r in mine], [r["nll_full"] for r in mine], [r["nll_none"] for r in mine])
    other = [records.get(d.name, name.removesuffix(", literals")) or {} for d in those]
    gain = [b["nll"] - a["nll"] for a, b in zip(mine, other, strict=True)]
    worth = [r["nll_none"] - r["nll_full"] for r in mine]
    low, high = ratio_interval(gain, worth)
    return {
        "way": name, "kind": kind, "documents": len(mine), "recovery": score.recovery, "recovery_low": score.low,
        "recovery_high": score.high, "paired": sum(gain) / sum(worth), "paired_low": low, "paired_high": high,
        **kept(mine), **{key: sum(r[key] for r in mine) / len(mine) for key in
                         ("flops_ratio", "cache_ratio", "literal_share")},
        "prefill_ratio": median(r["seconds"] / r["seconds_full"] for r in mine),
        "prefill_seconds": median(r["seconds"] for r in mine), "recipe": recipe.as_dict(),
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, default=None)
    parser.add_argument("--each", type=int, default=6, help="documents of each kind")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--measured", action="store_true", help="write what was measured so far, and measure nothing")
    parser.add_argument(
        "--work", type=Path, default=cache_folder(None) / "literals", help="where measurements are kept"
    )
    quiet()
    torch.set_num_threads(1)
    measure(parser.parse_args())
    Console().print("done")


if __name__ == "__main__":
    main()
