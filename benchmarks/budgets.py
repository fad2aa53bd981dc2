"""What survives at which budget: QuickMerge, every way to shrink a cache, and rivals, on the same documents and tasks.

    python benchmarks/documents.py && python benchmarks/budgets.py

Two parts, ``--part recovery`` and ``--part tasks``; all of them if none is named. Recovery is that of text that goes
on, on 18 of the held-out documents, six of each kind. Tasks are those that SmolLM2-135M can do (docs/methods/tasks.md),
with new seeds: the question last in three formats, first, in both places, and later. All of it in bfloat16. Every
measurement is written down as it comes, so that a run goes on where it was stopped, and ``--shard 0/2`` and ``--shard
1/2`` may run side by side; a run without ``--shard`` joins them. Writes benchmarks/results/budgets.json and
budget_tasks.json.

A second model, such as the folder that second_model.py makes, is measured on the main rows alone and written beside:

    python benchmarks/budgets.py --model FOLDER --name gemma3-270m
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.bench.records import Records
from quickmerge.bench.stats import ratio_interval
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.task_prompts import FORMATS
from quickmerge.datasets.tasks import TaskMaker
from quickmerge.datasets.text import Document, split_document
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.run import observe
from quickmerge.models import cache_folder, load
from quickmerge.recipe.tasks import bench_tasks
from quickmerge.sampling import evenly

HERE = Path(__file__).parent
RESULTS = HERE / "results"
Row = dict[str, Any]
CONTEXT, TARGET = 1024, 192
OLD: dict[str, Any] = {"window": 64, "recency": 0.85, "spans": "none"}
"""What QuickMerge was before it kept whole lines."""
ALL: dict[str, Any] = {"min_tokens": 0}
TASKS = ("needle", "needles4", "copy", "people", "pairs12", "constant", "labels")
MAIN = ("quickmerge 0.42", "quickmerge before spans 0.42", "quickmerge 0.2", "quickmerge before spans 0.2",
        "quickmerge 0.42, cache 0.3", "norm 0.41", "snapkv 0.41")  # fmt: skip
"""Rows of tasks that a second model is asked for."""
LATER = ("needle", "needles4", "copy", "people", "pairs12")
SEEDS = range(100, 105)
"""None that settings were chosen on."""


def text(reducer: Any, layer: Any = None, **more: Any) -> qm.Recipe:
    """A method for the text, however short it is."""
    return qm.Recipe(merge=qm.Merge(reducer, layer, qm.Prefix(min_tokens=0)), **more)


def fast(keep: float, cache: float, depth: int) -> qm.Recipe:
    """FastKV (arXiv 2502.01068) of its parts: one drop in the middle by the last tokens' attention, and SnapKV."""
    return text(qm.Attention(keep=keep, layers=1, window=8), depth // 2, cache=qm.SnapKV(keep=cache, **ALL))


def caches(keep: float, few: bool = False) -> dict[str, qm.Recipe]:
    """What leaves a share of the cache and merges nothing; ``few`` of these ways."""
    methods: tuple[qm.Evictor, ...] = (
        qm.AttentionNorm(keep, **ALL), qm.ObservedAttention(keep, **ALL), qm.SnapKV(keep, **ALL),
        qm.ExpectedAttention(keep, **ALL), qm.LagKV(keep, **ALL), qm.KVzip(keep, **ALL), qm.StreamingLLM(keep, **ALL),
    )  # fmt: skip
    if not few:
        methods += (
            qm.ObservedAttention(keep, average="sum", every=1, **ALL),
            qm.ObservedAttention(keep, heads="adaptive", **ALL), qm.KeyDiff(keep, **ALL),
        )  # fmt: skip
    return {f"{_name(method)} {keep:g}": qm.Recipe(cache=method) for method in methods}


def _name(method: qm.Evictor) -> str:
    """What tables call a method: its settings, but for what is the same of all here."""
    return ":".join(part for part in method.label.split(":") if not part.startswith("min_tokens"))


def with_prior(keeps: Sequence[float]) -> dict[str, qm.Recipe]:
    """The shipped prior, and the method that it corrects the slots of, without it."""
    prior = qm.Prior.from_pretrained(qm.shipped_prior("smollm2-135m"))
    found = {}
    for keep in keeps:
        method = qm.QuickMergePrior.from_prior(prior, keep=keep)
        own = {name: getattr(method, name) for name in ("window", "recency", "spans", "width")}
        found[f"quickmerge, slots of {own['width']}, {keep:g}"] = text(qm.QuickMerge(keep=keep, **own))
        found[f"quickmerge with prior {keep:g}"] = text(method)
    return found


def ways(depth: int, main: bool) -> dict[str, qm.Recipe]:
    """What recovery is measured of; ``main`` leaves out all but the first of each kind."""
    found = {f"quickmerge {keep:g}": text(qm.QuickMerge(keep=keep)) for keep in (0.42, 0.2, 0.6)}
    found |= {f"truncate {keep:g}": text(qm.Truncate(keep=keep)) for keep in (0.42, 0.2, 0.6)}
    found |= {
        "quickmerge 0.42, cache 0.41": text(qm.QuickMerge(keep=0.42), cache=qm.AttentionNorm(0.41, **ALL)),
        "quickmerge 0.42, cache 0.3": text(qm.QuickMerge(keep=0.42), cache=qm.AttentionNorm(0.3, **ALL)),
        "quickmerge 0.2, cache 0.23": text(qm.QuickMerge(keep=0.2), cache=qm.AttentionNorm(0.23, **ALL)),
    }
    if main:
        some = (qm.AttentionNorm(0.41, **ALL), qm.SnapKV(0.41, **ALL))
        return {**found, **{f"{method.name} 0.41": qm.Recipe(cache=method) for method in some}}
    found |= {"quickmerge 0.1": text(qm.QuickMerge(keep=0.1)), "truncate 0.1": text(qm.Truncate(keep=0.1))}
    found |= with_prior((0.42, 0.2, 0.1))
    for keep in (0.42, 0.2):
        found |= {
            f"quickmerge before spans {keep:g}": text(qm.QuickMerge(keep=keep, **OLD)),
            f"quickmerge as published {keep:g}": text(qm.QuickMerge.paper(keep=keep)),
        }
    return {
        **found, "attention 0.42": text(qm.Attention(keep=0.42)), "random 0.42": text(qm.Random(keep=0.42)),
        "tome 0.42": text(qm.ToMe(keep=0.42)), **caches(0.41), **caches(0.57, few=True),
        "gemfilter 0.41": text(qm.GemFilter(keep=0.41)), "specprefill 0.41": text(qm.SpecPrefill(keep=0.41)),
        "fastkv 0.42, cache 0.41": fast(0.42, 0.41, depth),
    }  # fmt: skip


def task_ways(mode: str) -> dict[str, qm.Recipe]:
    """What tasks are asked of."""
    if mode == "later":
        found: dict[str, qm.Recipe] = {}
        for keep in (0.42, 0.2):
            for method in (qm.KVzip(keep, **ALL), qm.ObservedAttention(keep, **ALL), qm.ExpectedAttention(keep, **ALL)):
                found[f"{method.name} {keep:g}"] = qm.Recipe(cache=method)
            found[f"quickmerge {keep:g}"] = text(qm.QuickMerge(keep=keep))
        return found
    found = {}
    for keep in (0.42, 0.2):
        found[f"quickmerge {keep:g}"] = text(qm.QuickMerge(keep=keep))
        if mode != "both":
            found[f"quickmerge before spans {keep:g}"] = text(qm.QuickMerge(keep=keep, **OLD))
        if mode == "last":
            found[f"quickmerge as published {keep:g}"] = text(qm.QuickMerge.paper(keep=keep))
            found[f"gemfilter {keep:g}"] = text(qm.GemFilter(keep=keep))
            found[f"specprefill {keep:g}"] = text(qm.SpecPrefill(keep=keep))
    found["quickmerge 0.42, cache 0.3"] = text(qm.QuickMerge(keep=0.42), cache=qm.AttentionNorm(0.3, **ALL))
    if mode == "last":
        found |= with_prior((0.42, 0.2))
        found["snapkv 0.41"] = qm.Recipe(cache=qm.SnapKV(0.41, **ALL))
        found["observed 0.41"] = qm.Recipe(cache=qm.ObservedAttention(0.41, **ALL))
        found["norm 0.41"] = qm.Recipe(cache=qm.AttentionNorm(0.41, **ALL))
    return found


# Recovery ------------------------------------------------------------------------------------------------------------


def measure_recovery(
    model: Any, documents: Sequence[Document], recipes: dict[str, qm.Recipe], records: Records
) -> None:
    """Every way on every document, in turns, with the full model before and after them."""
    shape = model_shape(model)
    with progress() as bar:
        task = bar.add_task("recovery", total=len(documents) * (len(recipes) + 1))
        for turn, document in enumerate(documents):
            names = list(recipes)
            todo = [
                n for n in names[turn % len(names) :] + names[: turn % len(names)] if not records.get(document.name, n)
            ]
            bar.update(task, advance=len(names) - len(todo))
            if not todo:
                bar.update(task, advance=1)
                continue
            watch = observe(model)
            full = float(document_nll(model, document, watch).mean())
            seconds = [watch.summary().prefill_seconds]
            none = float(continuation_nll(model, document.nothing, document.target, observe(model)).mean())
            found = []
            for name in todo:
                recipe = recipes[name]
                run = qm.apply(model, recipe)
                nll = float(document_nll(model, document, run).mean())
                (stats,) = run.summary().of.values()
                reducer = None if recipe.merge is None else recipe.merge.reducer  # type: ignore[union-attr]
                flops = shape.flops_ratio(reducer, stats.tokens_per_layer, stats.tokens_in, recipe.evictor)
                found.append({
                    "document": document.name, "kind": document.kind, "way": name, "nll": nll, "nll_full": full,
                    "nll_none": none, "flops_ratio": flops, "seconds": stats.prefill_seconds,
                    "cache_ratio": stats.prompt_cache_bytes / stats.prompt_cache_bytes_full,
                })  # fmt: skip
                bar.update(task, advance=1, description=f"{document.name}: {name}")
            document_nll(model, document, watch)
            seconds.append(watch.summary().prefill_seconds)
            for each in found:
                records.add({**each, "seconds_full": sum(seconds) / 2})
            bar.update(task, advance=1)


def recovery_rows(
    model: str, documents: Sequence[Document], recipes: dict[str, qm.Recipe], records: Records
) -> list[Row]:
    """A row for each way, over the documents that all of them were measured on."""
    whole = [d for d in documents if all(records.get(d.name, name) for name in recipes)]
    rows = []
    first = next(iter(recipes))
    for name, recipe in recipes.items():
        mine = [records.get(d.name, name) or {} for d in whole]
        ours = [records.get(d.name, first) or {} for d in whole]
        score = recovery([r["nll"] for r in mine], [r["nll_full"] for r in mine], [r["nll_none"] for r in mine])
        gain = [b["nll"] - a["nll"] for a, b in zip(mine, ours, strict=True)]
        worth = [r["nll_none"] - r["nll_full"] for r in mine]
        low, high = ratio_interval(gain, worth)
        rows.append({
            "model": model, "way": name, "documents": len(whole), "recovery": score.recovery,
            "recovery_low": score.low, "recovery_high": score.high, "nll": score.nll, "paired": sum(gain) / sum(worth),
            "paired_low": low, "paired_high": high, "flops_ratio": sum(r["flops_ratio"] for r in mine) / len(mine),
            "prefill_ratio": median(r["seconds"] / r["seconds_full"] for r in mine),
            "cache_ratio": sum(r["cache_ratio"] for r in mine) / len(mine), "recipe": recipe.as_dict(),
        })  # fmt: skip
    return rows


def run_recovery(args: argparse.Namespace) -> None:
    """Measure, and write what all shards have measured."""
    name, main = args.name or args.model, bool(args.name)
    model, tokenizer = load(args.model, dtype=torch.bfloat16)
    folder = (args.documents or cache_folder(None) / "documents") / "test"
    paths = sorted(folder.rglob("*.txt"))
    documents = [_document(tokenizer, path) for path in paths]
    documents = _some(documents, 4 if main else 6)
    recipes = ways(model.config.num_hidden_layers, main=main)
    settings = {"model": name, "context": CONTEXT, "target": TARGET, "dtype": "bfloat16"}
    shard = args.shard.replace("/", "-")
    mine = Records(args.work / f"recovery{args.suffix}-{shard}.jsonl", settings, ("document", "way"))
    if args.shard == "all":
        for other in sorted(args.work.glob(f"recovery{args.suffix}-*-*.jsonl")):
            _join(mine, other, settings)
    part = _shard(documents, args.shard)
    measure_recovery(model, part, recipes, mine)
    if args.shard == "all":
        rows = recovery_rows(name, part, recipes, mine)
        each = [{"model": name, **(mine.get(d.name, way) or {})} for d in part for way in recipes]
        told = {"environment": environment(), "dtype": "bfloat16", "context": CONTEXT, "target": TARGET}
        write_json(RESULTS / f"budgets{args.suffix}.json", {"rows": rows, "documents": each, **told})


def _some(documents: Sequence[Document], each: int) -> list[Document]:
    """As many of each kind, evenly taken, in turns: where a run is stopped, no kind is missing."""
    kinds = sorted({str(document.kind) for document in documents})
    found = [evenly([d for d in documents if d.kind == kind], each) for kind in kinds]
    return [document for turn in zip(*found, strict=True) for document in turn]


def _document(tokenizer: Any, path: Path) -> Document:
    body = path.read_text(encoding="utf-8")
    return split_document(tokenizer, body, path.stem, context=CONTEXT, target=TARGET, kind=path.parent.name)


def _join(records: Records, path: Path, settings: Row) -> None:
    """Take over what another shard has measured."""
    for line in path.read_text(encoding="utf-8").splitlines():
        held = json.loads(line)
        if held.pop("settings") == settings and records.get(held["document"], held["way"]) is None:
            records.add(held)


def _shard(items: Sequence[Any], shard: str) -> list[Any]:
    if shard == "all":
        return list(items)
    place, count = map(int, shard.split("/"))
    return list(items)[place::count]


# Tasks ---------------------------------------------------------------------------------------------------------------


def run_tasks(args: argparse.Namespace) -> None:
    """Ask, and write what was answered."""
    rows: list[Row] = []
    torch.manual_seed(0)
    name, main = args.name or args.model, bool(args.name)
    model, tokenizer = load(args.model, dtype=torch.bfloat16)
    settings = [("last", format) for format in FORMATS] + [("first", "cue"), ("both", "cue"), ("later", "cue")]
    for mode, format in settings[:2] if main else settings:
        if args.only and f"{mode}-{format}" not in args.only.split(","):
            continue
        later = mode == "later"
        maker = TaskMaker(tokenizer, CONTEXT, queries=4 if later else 1)
        recipes = task_ways(mode)
        if main:
            recipes = {way: recipe for way, recipe in recipes.items() if way in MAIN}
        tasks = [t for t in (LATER if later else TASKS) if mode == "last" or t not in ("copy", "constant", "labels")]
        if format != "cue":
            tasks = [t for t in tasks if t not in ("copy", "constant", "labels")]
        seeds = SEEDS[:2] if later else SEEDS
        with progress() as bar:
            task = bar.add_task(f"{mode} {format}", total=len(tasks) * len(seeds) * (1 + len(recipes)))
            found = bench_tasks(
                model, tokenizer, maker, recipes, tasks=tasks, seeds=seeds, format=format, mode=mode,
                records=args.work / f"tasks{args.suffix}-{mode}-{format}.jsonl", about={"model": name},
                advance=lambda label, task=task: bar.update(task, advance=1, description=label),
            )  # fmt: skip
        rows += [{"model": name, **row} for row in found.rows]
    if not args.only:
        told = {"environment": environment(), "tokens": CONTEXT, "seeds": [SEEDS[0], SEEDS[-1]]}
        write_json(RESULTS / f"budget_tasks{args.suffix}.json", {"rows": rows, **told})


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["recovery", "tasks"], default=None)
    parser.add_argument("--shard", default="all", help="0/2: every second document, from the first")
    parser.add_argument(
        "--only", default="", help="tasks of these modes and formats alone, such as last-chat,later-cue"
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--name", default="", help="of a second model, for its main rows and in its results")
    parser.add_argument("--documents", type=Path, default=None)
    parser.add_argument("--work", type=Path, default=cache_folder(None) / "budgets", help="where measurements are kept")
    args = parser.parse_args()
    args.suffix = f"-{args.name}" if args.name else ""
    quiet()
    torch.set_num_threads(1)
    if args.part in (None, "recovery"):
        run_recovery(args)
    if args.part in (None, "tasks"):
        run_tasks(args)
    Console().print("done")


if __name__ == "__main__":
    main()
