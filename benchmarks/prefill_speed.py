"""Measured prefill speed-up beside what the operations allow: writes benchmarks/results/prefill_speed.json.

    python benchmarks/prefill_speed.py [--tokens 512,1024,2048,4096] [--rounds 7]

Full and reduced prefills take turns in one process; each round gives one ratio, and medians and quartiles of the
ratios are reported. The reducer's own seconds are inside the reduced prefill and shown apart.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import tables
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from quickmerge.bench.harness import Arm, environment, interleave
from quickmerge.bench.stats import quartiles
from quickmerge.console.options import quiet, write_json
from quickmerge.data import demo_document
from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.cost import model_shape, plan_cost
from quickmerge.merge.reducers import QuickMerge
from quickmerge.merge.run import RunStats, observe
from quickmerge.merge.tokens import Schedule
from quickmerge.models import load

HERE = Path(__file__).parent


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", default="512,1024,2048,4096")
    parser.add_argument("--keep", default="0.2,0.42,0.6")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prefill_speed.json")
    args = parser.parse_args()
    quiet()
    model, tokenizer = load(args.model)
    ids = tokenizer(demo_document(), return_tensors="pt", add_special_tokens=False)["input_ids"]
    shape = model_shape(model)
    schedule = Schedule.of(None, len(shape.weights))
    rows = []
    for tokens in map(int, args.tokens.split(",")):
        prompt = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
        for keep in track(list(map(float, args.keep.split(","))), f"{tokens} tokens", transient=True):
            reducer = replace(QuickMerge(), keep=keep)
            arms = [Arm("full", partial(observe, model)), Arm("reduced", partial(reduce, model, reducer, min_tokens=0))]
            timed = partial(read, model)
            found = interleave(arms, [prompt], timed, rounds=args.rounds, warm_up=timed)
            full, reduced = ([stats.prefill_seconds for stats in each] for each in found)
            own = [stats.reducer_seconds for stats in found[1]]
            ratios = [a / b for a, b in zip(full, reduced, strict=True)]
            allowed = plan_cost(shape, reducer, schedule, tokens).speedup
            low, _, high = quartiles(ratios)
            rows.append({
                "tokens": tokens, "keep": keep, "layer": schedule.layers[0], "rounds": args.rounds,
                "full_seconds": median(full), "reduced_seconds": median(reduced),
                "speedup": median(ratios), "speedup_q1": low, "speedup_q3": high, "allowed_by_flops": allowed,
                "of_allowed": median(ratios) / allowed, "reducer_seconds": median(own),
                "reducer_share": median(o / r for o, r in zip(own, reduced, strict=True)),
            })  # fmt: skip
    write_json(args.out, {"rows": rows, "environment": environment(), "model": args.model})
    tables.speed(rows).print(Console())


def read(model: Any, arm: Arm, prompt: Tensor, turn: int) -> RunStats:
    """What an arm took to read a prompt ``(1, N)``."""
    with torch.inference_mode(), arm.context() as run:
        model(prompt, use_cache=True, logits_to_keep=1)
    stats: RunStats = run.summary()
    return stats


if __name__ == "__main__":
    main()
