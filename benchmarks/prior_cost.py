"""What the shipped prior costs in a prefill, beside what the prefill saves: benchmarks/results/prior_cost.json.

python benchmarks/prior_cost.py

Full prefill, QuickMerge and QuickMerge with the prior take turns on the same prompts. The prior's own time is that of
its saliency term, its reading of the slots and its corrections, measured inside the run.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median

from prefill_speed import read
from rich.progress import track

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment, interleave
from quickmerge.bench.stats import quartiles
from quickmerge.console.options import quiet
from quickmerge.data import demo_document, shipped_prior
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.prior import Prior, QuickMergePrior
from quickmerge.merge.run import observe

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
        for keep in track(args.keep, f"{tokens} tokens", transient=True):
            plain = qm.QuickMerge(keep=keep)
            learnt = QuickMergePrior.from_prior(prior, keep=keep)
            arms = [
                Arm("full", partial(observe, model)), Arm("plain", partial(qm.reduce, model, plain, min_tokens=0)),
                Arm("prior", partial(qm.reduce, model, learnt, min_tokens=0)),
            ]  # fmt: skip
            timed = partial(read, model)
            found = interleave(arms, [ids[:, :tokens]], timed, rounds=args.rounds, warm_up=timed)
            seconds, own = (
                {arm.name: [getattr(one, of) for one in each] for arm, each in zip(arms, found, strict=True)}
                for of in ("prefill_seconds", "reducer_seconds")
            )
            counts = found[-1][-1].tokens_per_layer
            saved = [f - p for f, p in zip(seconds["full"], seconds["plain"], strict=True)]
            extra = [w - p for w, p in zip(own["prior"], own["plain"], strict=True)]
            share = [e / s for e, s in zip(extra, saved, strict=True)]
            more = shape.reducer_flops(learnt, counts) - shape.reducer_flops(plain, counts)
            less = shape.prefill_flops([counts[0]] * len(counts)) - shape.prefill_flops(counts)
            low, _, high = quartiles(share)
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
