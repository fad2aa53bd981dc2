"""How long single tokens take while the clusters change (benchmarks/results/multipole_waits.json).

    python benchmarks/multipole_waits.py [--tokens 4096] [--new 140]

One prompt, of the pages of this repository's docs, is read with multipole attention, and the same tokens are then read
after it one by one in three ways, which take turns at every token: with the model's own attention on the same kind of
cache; with all clustering done when it is due (``ahead=False``); and with clustering ahead of that, the default. Every
token's seconds are noted by the clock and by the processor's time of this process, which other programs on the machine
change less. Clustering ahead has the prompt's clusters made while it is read; the seconds of that are noted, too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import multipole_tables
import torch
from rich.console import Console
from torch import Tensor

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.models.compat import cache_argument

HERE = Path(__file__).parent
PAGES = HERE.parent / "docs"
QUANTILES = (0.5, 0.95, 0.99)


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=4096, help="of the prompt")
    parser.add_argument("--new", type=int, default=140, help="tokens after it; with 129 there is an update among them")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "multipole_waits.json")
    args = parser.parse_args()
    if args.new < 3:
        parser.error(f"--new must be at least 3, got {args.new}")
    torch.set_num_threads(args.threads)
    quiet()
    model, tokenizer = qm.load(args.model)
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted(PAGES.rglob("*.md")))
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, : args.tokens + args.new]
    settings = qm.Multipole(budget=args.budget)
    with torch.inference_mode(), progress() as bar:
        task = bar.add_task("reading", total=args.new)
        rows, prompt = measure(model, ids, args.tokens, settings, lambda: bar.update(task, advance=1))
    meta = {
        "model": args.model, "tokens": args.tokens, "new": args.new, "threads": args.threads,
        "settings": asdict(settings), **prompt,
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    multipole_tables.waits(rows).print(Console())
    return 0


def measure(
    model: Any, ids: Tensor, tokens: int, settings: qm.Multipole, advance: Any = lambda: None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each way, and the seconds of the prompt.

    Args:
        model: a language model.
        ids: ``(1, N)``, of which the first ``tokens`` are the prompt.
        tokens: of the prompt.
        settings: of multipole attention.
        advance: called after each further token.
    """
    cache = qm.MultipoleCache(model.config)
    with qm.multipole(model, settings) as run:
        model(ids[:, :tokens], **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
    prompt = {"prefill_seconds": run.summary().prefill_seconds, "prompt_seconds": run.summary().prompt_seconds}
    caches = {"dense, cache in place": cache, "all when due": copy.deepcopy(cache), "ahead": copy.deepcopy(cache)}
    for name in ("dense, cache in place", "all when due"):
        for layer in caches[name].layers:
            layer.forget_clusters()
    runs = {
        "dense, cache in place": None,
        "all when due": qm.multipole(model, settings, ahead=False),
        "ahead": qm.multipole(model, settings),
    }
    # One token for each way before the first that counts, so that no way pays for what only happens once.
    warm_up(model, ids[:, :1])
    wall: dict[str, list[float]] = {name: [] for name in caches}
    own: dict[str, list[float]] = {name: [] for name in caches}
    names = list(caches)
    for i in range(ids.shape[1] - tokens):
        for turn in range(len(names)):
            name = names[(turn + i) % len(names)]
            inside: Any = nullcontext() if runs[name] is None else runs[name]
            with inside:
                began, busy = time.perf_counter(), time.process_time()
                model(ids[:, tokens + i : tokens + i + 1], **cache_argument(model, caches[name]), use_cache=True)
                wall[name].append(time.perf_counter() - began)
                own[name].append(time.process_time() - busy)
        advance()
    found = []
    for name, each in runs.items():
        stats = None if each is None else each.summary()
        found.append({
            "name": name, "tokens": tokens, "new": len(wall[name]),
            **quantiles("", own[name]), **quantiles("wall_", wall[name]),
            "updates": 0.0 if stats is None else stats.updates,
            "most_at_once": 0.0 if stats is None else stats.most_at_once,
        })  # fmt: skip
    return found, prompt


def warm_up(model: Any, ids: Tensor) -> None:
    """Read a token without a cache."""
    model(ids, use_cache=False)


def quantiles(prefix: str, seconds: list[float]) -> dict[str, float]:
    """The first token, and quantiles over all of them."""
    ordered = torch.tensor(seconds, dtype=torch.float64)
    parts = {f"{prefix}p{100 * q:.0f}": float(ordered.quantile(q)) for q in QUANTILES}
    most, median = max(seconds), statistics.median(seconds)
    return {f"{prefix}first": seconds[0], **parts, f"{prefix}max": most, f"{prefix}max_by_median": most / median}


if __name__ == "__main__":
    sys.exit(main())
