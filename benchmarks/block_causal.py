"""Perplexity with a bounded cache: block-causal merging against rivals that keep as many entries.

    python benchmarks/documents.py && python benchmarks/block_causal.py

For each held-out document, per original token and on the same positions for everybody: the unmodified model, every
reducer in block-causal mode, and two sliding windows with sinks. ``window`` holds at every position as many entries as
block-causal mode does there; ``window of the final size`` holds all along what that mode ends with, more than it
anywhere else. Positions count from where even that has begun to forget. Writes benchmarks/results/block_causal.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import tables
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from quickmerge.bench.harness import environment
from quickmerge.bench.quality import token_nll
from quickmerge.console.options import quiet, write_json
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers import make_reducer
from quickmerge.models import cache_folder, load

HERE = Path(__file__).parent


def windowed_nll(model: Any, ids: Tensor, entries: Tensor, sinks: int) -> Tensor:
    """NLL when query t sees the first ``sinks`` tokens and the most recent ones, ``entries (N,)[t]`` in all."""
    n = ids.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)[None]
    seen = (key <= query) & ((key < sinks) | (query - key < entries[:, None] - sinks))
    with torch.inference_mode():
        logits = model(ids, attention_mask=seen[None, None], use_cache=False).logits[:, :-1]
        picked: Tensor = logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None])
    return -picked[..., 0]


def held_at(tokens: int, chunk: int, window: int, final: int) -> Tensor:
    """``(N,)``: how many entries block-causal mode shows each of ``tokens`` queries, of which the last sees ``final``.

    A chunk is slots for query t from ``end + window`` on, all chunks keep as many, and what is newer is seen in full.
    """
    place = torch.arange(tokens)
    chunks = (place - window).clamp_min(0) // chunk
    done = int(chunks[-1])
    each = (final - (tokens - done * chunk)) / max(1, done)
    return (place + 1 - chunks * chunk + chunks * each).round().long()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=Path, default=None)
    parser.add_argument("--reducer", default="quickmerge,quickmerge:pool=15:merge=0.1,attention,random")
    parser.add_argument("--keep", default="0.2,0.42")
    parser.add_argument("--tokens", type=int, default=1216)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--skip", type=int, default=640, help="first positions, which don't count")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "block_causal.json")
    args = parser.parse_args()
    quiet()
    folder = args.documents or cache_folder(None) / "documents"
    files = sorted((folder / "test").rglob("*.txt"))
    model, tokenizer = load(args.model)
    skip = args.skip
    nll: dict[tuple[str, float], list[float]] = {}
    held: dict[tuple[str, float], float] = {}
    for path in track(files, "documents"):
        text = path.read_text(encoding="utf-8")[: 64 * args.tokens]
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"][:, : args.tokens]
        nll.setdefault(("full", 1.0), []).append(float(token_nll(model, ids)[:, skip:].mean()))
        held["full", 1.0] = float(ids.shape[1])
        for keep in map(float, args.keep.split(",")):
            for name in args.reducer.split(","):
                reducer = make_reducer(name, keep=keep)
                run = reduce(model, reducer, mode="block_causal", chunk=args.chunk, window=args.window)
                nll.setdefault((name, keep), []).append(float(token_nll(model, ids, run)[:, skip:].mean()))
                held[name, keep] = run.summary().tokens_per_layer[-1]
            final = int(held[name, keep])
            shown = held_at(ids.shape[1], args.chunk, args.window, final)
            for called, entries in (("window", shown), ("window of the final size", torch.full_like(shown, final))):
                nll.setdefault((called, keep), []).append(float(windowed_nll(model, ids, entries, 4)[:, skip:].mean()))
                held[called, keep] = float(final)
    base = np.array(nll["full", 1.0])
    rows = []
    for (name, keep), values in nll.items():
        extra = np.array(values) - base
        rows.append({
            "reducer": name, "keep": keep, "documents": len(values), "entries_at_end": held[name, keep],
            "perplexity": float(np.exp(np.mean(values))), "extra_nll": float(extra.mean()),
            "extra_nll_stderr": float(extra.std(ddof=1) / len(extra) ** 0.5),
        })  # fmt: skip
    write_json(args.out, {"rows": rows, "environment": environment(), "settings": {
        "model": args.model, "tokens": args.tokens, "chunk": args.chunk, "window": args.window, "skipped": skip,
    }})  # fmt: skip
    tables.block_causal(rows).print(Console())


if __name__ == "__main__":
    main()
