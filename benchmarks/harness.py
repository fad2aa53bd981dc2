"""lm-eval's RULER tasks and one of our needles through ``--model quickmerge``: scores beside what reading took.

    python benchmarks/harness.py --rounds 10

Every way answers the same samples of every task, a few in each round and task by task in turns, so that a machine that
slows down is no way's own. One task is asked of lm-eval's own ``hf`` too: its texts must be those of our plain model,
to the letter. RULER makes 500 samples a task and length, of which ``--rounds`` times ``--each`` are asked. What was
measured is added to benchmarks/results/harness.partial.jsonl as it comes, where a run that was broken off goes on;
harness.json is written from it, and a later run with more rounds goes on behind that.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from notes import Notes

from quickmerge.bench.harness import environment
from quickmerge.bench.stats import wilson
from quickmerge.console.options import write_json
from quickmerge.models import load
from quickmerge.recipe import Recipe
from quickmerge.serve.harness import TASKS_FOLDER, check_lengths
from quickmerge.serve.lm_eval import QuickmergeLM, model_folder
from quickmerge.serve.short_form import recipe_of

HERE = Path(__file__).parent
MODEL = "smollm2-135m"
RULER = ("niah_single_1", "niah_multikey_2", "ruler_vt")
OURS = ("quickmerge_needle_number",)
WAYS = {
    "plain": {},
    "quickmerge 0.42": {"reducer": "quickmerge", "keep": 0.42},
    "quickmerge 0.2": {"reducer": "quickmerge", "keep": 0.2},
    "truncate 0.42": {"reducer": "truncate", "keep": 0.42},
}
HF = "lm-eval's hf"
ALIKE = "niah_single_1"
"""The task that is asked of lm-eval's own adapter too, at the first length."""


def ask(lm: Any, task: Any, name: str, ids: list[int], tokens: int) -> tuple[list[float], list[str]]:
    """Scores of the samples of these numbers, each the share of what was asked for, and the texts."""
    found = simple_evaluate(
        lm, tasks=[task], samples={name: ids}, bootstrap_iters=0, log_samples=True,
        gen_kwargs={"max_gen_toks": tokens},
    )  # fmt: skip
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    texts = [sample["resps"][0][0] for sample in samples]
    return [share(sample["doc"]["outputs"], text) for sample, text in zip(samples, texts, strict=True)], texts


def share(outputs: list[str], text: str) -> float:
    """RULER's score of a text, and that of our needles."""
    return sum(each.lower() in text.lower() for each in outputs) / len(outputs)


def row_of(records: list[dict[str, Any]], recipe: Recipe | None) -> dict[str, Any]:
    """The row of a way, task and length: the score, Wilson's interval where scores are right or wrong, and costs."""
    scores = [score for record in records for score in record["scores"]]
    low, high = wilson(int(sum(scores)), len(scores)) if all(s in (0, 1) for s in scores) else (None, None)
    first = {name: records[0][name] for name in ("task", "tokens", "way")}
    costs = {
        name: fmean(record["costs"][name] for record in records)
        for name in ("tokens_in", "tokens_kept", "flops_ratio", "cache_bytes", "cache_ratio")
    }
    costs["prefill_seconds"] = median(record["costs"]["prefill_seconds"] for record in records)
    return {**first, "samples": len(scores), "score": fmean(scores), "low": low, "high": high, **costs,
            "recipe": None if recipe is None or recipe.empty else recipe.as_dict()}  # fmt: skip


def write(out: Path, done: dict[str, list[dict[str, Any]]], settings: dict[str, Any], recipes: Any) -> None:
    """Rows of all that was measured, beside the records."""
    records = [record for found in done.values() for record in found]
    cells: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((record["tokens"], record["task"], record["way"]), []).append(record)
    rows = [row_of(found, recipes[way]) for (_, _, way), found in cells.items() if way != HF]
    texts = {way: [t for (_, task, w), found in cells.items() if w == way and task == ALIKE for r in found
                   if r["tokens"] == settings["lengths"][0] for t in r["texts"]] for way in ("plain", HF)}  # fmt: skip
    meta = {**settings, "same_as_hf": texts["plain"] == texts[HF], "compared": len(texts[HF]),
            "environment": environment()}  # fmt: skip
    write_json(out, {"rows": rows, "records": records, "meta": meta})


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--each", type=int, default=2, help="samples of a task and length in a round")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, default=24, help="written at most")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "harness.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"model": MODEL, "dtype": args.dtype, "lengths": args.lengths, "each": args.each,
                "max_gen_toks": args.tokens, "lm_eval": version("lm_eval")}  # fmt: skip
    notes = Notes(args.out.with_suffix(".partial.jsonl"), settings)
    if args.out.is_file():
        before = json.loads(args.out.read_text(encoding="utf-8"))
        if {name: before["meta"].get(name) for name in settings} == settings:
            for record in before["records"]:
                if record["key"] not in notes.done:
                    notes.add(record["key"], [record])
    model, tokenizer = load(MODEL, dtype=args.dtype)
    recipes = {name: recipe_of(None, given) for name, given in WAYS.items()}
    ways = {name: QuickmergeLM(model, recipe, tokenizer=tokenizer, batch_size=args.each)
            for name, recipe in recipes.items()}  # fmt: skip
    hf = HFLM(model, tokenizer=tokenizer, batch_size=args.each)
    made: dict[tuple[int, str], Any] = {}
    for number, length, name in itertools.product(range(args.rounds), args.lengths, (RULER[0], *OURS, *RULER[1:])):
        asked = [*ways, *([HF] if name == ALIKE and length == args.lengths[0] else [])]
        shift = number % len(asked)
        for way in asked[shift:] + asked[:shift]:
            key = f"{name} {length} {way} {number}"
            if key in notes.done:
                continue
            if (length, name) not in made:
                made[length, name] = task_of(name, length, tokenizer)
            lm = hf if way == HF else ways[way]
            if way != HF:
                lm.counted.costs.clear()
            ids = list(range(number * args.each, (number + 1) * args.each))
            scores, texts = ask(lm, made[length, name], name, ids, args.tokens)
            costs = None if way == HF else lm.counted.total.as_dict()
            told = {"key": key, "task": name, "tokens": length, "way": way, "round": number}
            notes.add(key, [{**told, "scores": scores, "texts": texts, "costs": costs}])
            print(f"{key}: {sum(scores) / len(scores):.2f}", flush=True)
    write(args.out, notes.done, settings, recipes)
    notes.remove()


def task_of(name: str, length: int, tokenizer: Any) -> Any:
    """A task of lm-eval's with its samples, drawn as its command line draws them."""
    check_lengths([name], [length], tokenizer)
    metadata = {"max_seq_lengths": [length], "tokenizer": model_folder(MODEL)}
    random.seed(0)
    np.random.seed(1234)
    return TaskManager(include_path=str(TASKS_FOLDER), metadata=metadata).load([name])["tasks"][name]


if __name__ == "__main__":
    main()
