"""What a smaller cache frees of the process's memory, and what a decoding step takes (results/cache_memory.json).

    python benchmarks/documents.py && python benchmarks/cache_memory.py [--tokens 8000] [--dtype bfloat16]

Each way reads the same prompt in a process of its own. Resident memory is that of the process behind the prompt, when
everything but model and cache is gone, less what it was before; steps are timed behind it, and the full cache's in the
same process in turns, so that a slow machine slows both.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from rich.console import Console
from transformers import DynamicCache

import quickmerge as qm
from quickmerge.bench.harness import environment, now
from quickmerge.console.options import quiet, write_json
from quickmerge.merge.run import cache_bytes, observe
from quickmerge.models import cache_folder, load
from quickmerge.models.compat import cache_argument

HERE = Path(__file__).parent
STEPS, ROUNDS = 8, 6
WAYS: dict[str, qm.Recipe | None] = {
    "full": None,
    "norm 0.3": qm.Recipe(cache=qm.AttentionNorm(0.3)),
    "snapkv:heads=adaptive 0.3": qm.Recipe(cache=qm.SnapKV(0.3, heads="adaptive")),
    "quickmerge 0.42": qm.Recipe(merge=qm.QuickMerge(keep=0.42)),
    "quickmerge 0.42, cache 0.3": qm.Recipe(merge=qm.QuickMerge(keep=0.42, cache=0.3)),
}


def resident() -> int:
    """Bytes of the process that are in memory, after what is free was given back."""
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmRSS in /proc/self/status")


def prompt(tokenizer: Any, tokens: int) -> torch.Tensor:
    """``(1, tokens)`` of held-out documents, one behind the other."""
    found: list[int] = []
    for path in sorted((cache_folder(None) / "documents" / "test").rglob("*.txt")):
        found += tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
        if len(found) >= tokens:
            return torch.tensor([found[:tokens]])
    raise SystemExit(f"the documents hold {len(found)} tokens, {tokens} are needed: run documents.py")


def steps(model: Any, cache: Any, run: Any) -> float:
    """Seconds of a decoding step, over a few; they are taken back."""
    with run:
        began = now(model.device)
        for token in range(STEPS):
            model(torch.tensor([[token + 100]]), **cache_argument(model, cache), use_cache=True)
        seconds = (now(model.device) - began) / STEPS
        cache.crop(-STEPS)
    return seconds


@torch.inference_mode()
def measure(way: str, tokens: int, dtype: str) -> dict[str, Any]:
    """One way, in this process."""
    model, tokenizer = load("smollm2-135m", dtype=getattr(torch, dtype))
    ids, recipe = prompt(tokenizer, tokens), WAYS[way]

    def context() -> Any:
        return observe(model) if recipe is None else qm.apply(model, recipe)

    with observe(model):  # what the first forward of all allocates for good is nobody's own
        model(ids[:, :256], use_cache=False)
    before = resident()
    cache = DynamicCache(config=model.config)
    with context():
        began = now(model.device)
        model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1)
        prefill = now(model.device) - began
    held = resident() - before
    took = [steps(model, cache, context())]
    own = cache_bytes(cache)
    full = DynamicCache(config=model.config)
    with observe(model):
        model(ids, **cache_argument(model, full), use_cache=True, logits_to_keep=1)
    ratios = []
    for _ in range(ROUNDS):
        plain = steps(model, full, observe(model))
        mine = steps(model, cache, context())
        took.append(mine)
        ratios.append(plain / mine)
    low, middle, high = quantiles(ratios, n=4)
    return {
        "way": way, "tokens": tokens, "dtype": dtype, "resident_bytes": held, "cache_bytes": own,
        "cache_bytes_full": cache_bytes(full), "prefill_seconds": prefill, "step_seconds": sorted(took)[len(took) // 2],
        "step_speedup": middle, "step_speedup_q1": low, "step_speedup_q3": high,
        "recipe": None if recipe is None else recipe.as_dict(),
    }  # fmt: skip


def main() -> None:
    """Measure every way in a process of its own, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--way", default=None, choices=list(WAYS), help="this one, in this process, to stdout")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "cache_memory.json")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if args.way is not None:
        print(json.dumps(measure(args.way, args.tokens, args.dtype)))
        return
    rows = []
    for way in WAYS:
        Console(stderr=True).print(way)
        command = [sys.executable, __file__, "--way", way, "--tokens", str(args.tokens), "--dtype", args.dtype]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    write_json(args.out, {"rows": rows, "environment": environment()})


if __name__ == "__main__":
    main()
