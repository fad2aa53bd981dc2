"""Is a budget that follows the prior's surprise better than a fixed share? benchmarks/results/prior_budget.json.

python benchmarks/documents.py && python benchmarks/prior_budget.py [--split dev]

Block-causal mode, merging from the prior's block on: perplexity per original token on the same positions, with the
entries that each budget really held at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tables
from rich.console import Console
from rich.progress import track

from quickmerge.bench.harness import environment
from quickmerge.bench.quality import token_nll
from quickmerge.console.options import quiet, write_json
from quickmerge.data import shipped_prior
from quickmerge.merge.attach import reduce
from quickmerge.merge.prior import Prior
from quickmerge.merge.prior.budget import Surprise
from quickmerge.merge.reducers import make_reducer
from quickmerge.models import cache_folder, load

HERE = Path(__file__).parent


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", default="test", choices=["test", "dev"])
    parser.add_argument("--prior", type=Path, default=shipped_prior("smollm2-135m"))
    parser.add_argument("--reducer", default="attention,quickmerge:pool=1:merge=0")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.2, 0.42])
    parser.add_argument("--gamma", type=float, nargs="+", default=[-0.5, 0.25, 0.5, 1.0])
    parser.add_argument("--tokens", type=int, default=1216)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prior_budget.json")
    args = parser.parse_args()
    quiet()
    prior = Prior.from_pretrained(args.prior)
    model, tokenizer = load("smollm2-135m")
    chunk = window = 128
    found: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for path in track(sorted((cache_folder() / "documents" / args.split).rglob("*.txt")), "documents"):
        text = path.read_text(encoding="utf-8")[: 64 * args.tokens]
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, : args.tokens]
        for keep in args.keep:
            for name in args.reducer.split(","):
                budgets = {"fixed share": keep} | {
                    f"surprise, gamma {gamma:g}": Surprise(prior, keep, gamma) for gamma in args.gamma
                }
                for budget, value in budgets.items():
                    run = reduce(model, make_reducer(name, keep=value), prior.config.trained_for["layers"][0],
                                 mode="block_causal", chunk=chunk, window=window)  # fmt: skip
                    nll = float(token_nll(model, ids, run)[:, chunk + window :].mean())
                    held = run.summary().tokens_per_layer[-1]
                    found.setdefault((name, keep, budget), []).append((nll, held))
    rows = []
    for (name, keep, budget), pairs in found.items():
        nll, held = np.array(pairs).T
        gain = np.array([p[0] for p in found[name, keep, "fixed share"]]) - nll
        rows.append({
            "reducer": name, "keep": keep, "budget": budget, "entries_at_end": float(held.mean()),
            "perplexity": float(np.exp(nll.mean())), "gain": float(gain.mean()),
            "gain_stderr": float(gain.std(ddof=1) / len(gain) ** 0.5), "documents": len(pairs),
        })  # fmt: skip
    write_json(args.out, {"rows": rows, "environment": environment(), "settings": {
        "model": "smollm2-135m", "tokens": args.tokens, "chunk": chunk, "window": window, "split": args.split,
    }})  # fmt: skip
    tables.prior_budget(rows).print(Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
