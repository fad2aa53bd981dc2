"""lm-eval's RULER tasks and our needles through ``--model quickmerge``: scores beside what reading took.

    python benchmarks/harness.py

Every way answers the same samples of every task, task by task in turns, so that a machine that slows down is no way's
own. One task is asked of lm-eval's own ``hf`` too: its texts must be those of our plain model, to the letter. RULER
makes 500 samples a task; ``--limit`` says how many of them are asked, for each length. Adds to
benchmarks/results/harness.partial.jsonl as it goes, where a run that was broken off goes on, and writes harness.json.
"""

from __future__ import annotations

import argparse
import random
from importlib.metadata import version
from pathlib import Path
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


def ask(lm: Any, task: Any, name: str, limit: int, tokens: int) -> tuple[list[float], list[str]]:
    """Scores of the samples, each the share of what was asked for, and the texts."""
    found = simple_evaluate(
        lm, tasks=[task], limit=limit, bootstrap_iters=0, log_samples=True, gen_kwargs={"max_gen_toks": tokens}
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    texts = [sample["resps"][0][0] for sample in samples]
    return [share(sample["doc"]["outputs"], text) for sample, text in zip(samples, texts, strict=True)], texts


def share(outputs: list[str], text: str) -> float:
    """RULER's score of a text, and that of our needles."""
    return sum(each.lower() in text.lower() for each in outputs) / len(outputs)


def row_of(record: dict[str, Any], recipe: Recipe | None) -> dict[str, Any]:
    """A row of results: the score, Wilson's interval where scores are right or wrong, costs, and the recipe."""
    scores = record["scores"]
    low, high = wilson(sum(scores), len(scores)) if all(s in (0, 1) for s in scores) else (None, None)
    told = {name: record[name] for name in ("task", "tokens", "way", "costs")}
    return {**told, "samples": len(scores), "score": sum(scores) / len(scores), "low": low, "high": high,
            "recipe": None if recipe is None or recipe.empty else recipe.as_dict()}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--limit", type=int, nargs="+", default=[10, 5], help="samples of a task, for each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--tokens", type=int, default=24, help="written at most")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "harness.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"model": MODEL, "dtype": args.dtype, "lengths": args.lengths, "limit": args.limit,
                "max_gen_toks": args.tokens, "batch": args.batch, "lm_eval": version("lm_eval")}  # fmt: skip
    notes = Notes(args.out.with_suffix(".partial.jsonl"), settings)
    model, tokenizer = load(MODEL, dtype=args.dtype)
    recipes = {name: recipe_of(None, given) for name, given in WAYS.items()}
    ways = {name: QuickmergeLM(model, recipe, tokenizer=tokenizer, batch_size=args.batch)
            for name, recipe in recipes.items()}  # fmt: skip
    hf = HFLM(model, tokenizer=tokenizer, batch_size=args.batch)
    for number, (length, limit) in enumerate(zip(args.lengths, args.limit, strict=True)):
        check_lengths(list(RULER), [length], tokenizer)
        metadata = {"max_seq_lengths": [length], "tokenizer": model_folder(MODEL), "samples": max(args.limit)}
        manager = TaskManager(include_path=str(TASKS_FOLDER), metadata=metadata)
        for name in (RULER[0], *OURS, *RULER[1:]):
            asked = [*ways, *([HF] if name == ALIKE and not number else [])]
            todo = [way for way in asked if f"{name} {length} {way}" not in notes.done]
            if not todo:
                continue
            random.seed(0)
            np.random.seed(1234)
            task = manager.load([name])["tasks"][name]
            for way in todo:
                lm = hf if way == HF else ways[way]
                if way != HF:
                    lm.counted.costs.clear()
                scores, texts = ask(lm, task, name, limit, args.tokens)
                costs = None if way == HF else lm.counted.total.as_dict()
                record = {"task": name, "tokens": length, "way": way, "scores": scores, "texts": texts, "costs": costs}
                notes.add(f"{name} {length} {way}", [record])
                print(f"{name} {length} {way}: {sum(scores) / len(scores):.2f}", flush=True)
    records = [record for found in notes.done.values() for record in found]
    rows = [row_of(record, recipes.get(record["way"])) for record in records]
    texts = {r["way"]: r["texts"] for r in records if r["task"] == ALIKE and r["tokens"] == args.lengths[0]}
    meta = {**settings, "same_as_hf": texts["plain"] == texts[HF], "compared": len(texts[HF]),
            "environment": environment()}  # fmt: skip
    write_json(args.out, {"rows": rows, "records": records, "meta": meta})
    notes.remove()


if __name__ == "__main__":
    main()
