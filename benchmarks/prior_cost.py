"""What the shipped prior costs in a prefill, beside what the prefill saves: benchmarks/results/prior_cost.json.

python benchmarks/prior_cost.py

Full prefill, QuickMerge and QuickMerge with the prior take turns on the same prompts. The prior's own time is that of
its saliency term, its reading of the slots and its corrections, measured inside the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import median, quantiles

import torch
from rich.progress import track

import quickmerge as qm
from quickmerge.bench.environment import environment
from quickmerge.console.options import quiet
from quickmerge.data import demo_document, shipped_prior
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.observe import observe
from quickmerge.merge.prior import Prior, QuickMergePrior

HERE = Path(__file__).parent


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prior", type=Path, default=shipped_prior("smollm2-135m"))
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.2, 0.42])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prior_cost.json")
    args = parser.parse_args()
    quiet()
    model, tokenizer = qm.load("smollm2-135m")
    shape = model_shape(model)
    prior = Prior.from_pretrained(args.prior)
    ids = tokenizer(demo_document() * 4, return_tensors="pt")["input_ids"]
    rows = []
    for tokens in args.tokens:
        for keep in args.keep:
            plain = qm.QuickMerge(keep=keep)
            ways = {
                "full": None,
                "plain": plain,
                "prior": QuickMergePrior.from_prior(prior, keep=keep),
            }
            seconds: dict[str, list[float]] = {name: [] for name in ways}
            own: dict[str, list[float]] = {name: [] for name in ways}
            for turn in track(range(args.rounds + 1), f"{tokens} tokens, keep {keep:g}", transient=True):
                for name, way in ways.items():
                    run = observe(model) if way is None else qm.reduce(model, way, min_tokens=0)
                    with torch.inference_mode(), run:
                        model(ids[:, :tokens], use_cache=True, logits_to_keep=1)
                    stats = run.summary()
                    if turn:  # the first turn pays for allocation
                        seconds[name].append(stats.prefill_seconds)
                        own[name].append(stats.reducer_seconds)
                    counts = stats.tokens_per_layer
            saved = [f - p for f, p in zip(seconds["full"], seconds["plain"], strict=True)]
            extra = [w - p for w, p in zip(own["prior"], own["plain"], strict=True)]
            share = [e / s for e, s in zip(extra, saved, strict=True)]
            more = shape.reducer_flops(ways["prior"], counts) - shape.reducer_flops(plain, counts)
            less = shape.prefill_flops([counts[0]] * len(counts)) - shape.prefill_flops(counts)
            low, _, high = quantiles(share, n=4)
            rows.append({
                "tokens": tokens, "keep": keep, "rounds": args.rounds,
                **{f"{name}_seconds": median(times) for name, times in seconds.items()},
                "prior_own_seconds": median(extra), "share_of_saved": median(share),
                "share_q1": low, "share_q3": high, "flops_share_of_saved": more / less,
                "prior_bytes": prior.bytes,
            })  # fmt: skip
            print(rows[-1])
    result = {"rows": rows, "meta": {"model": "smollm2-135m", "environment": environment()}}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
