"""How prefill, decoding, cache and peak memory grow with the prompt: writes benchmarks/results/curves.json.

    python benchmarks/curves.py [--shapes llama-8b smollm2] [--tokens 1024 2048 ...] [--batches 1 4 16] [--device cuda]

``llama-8b`` has the heads of a Llama of 8B (32 for queries, 8 for keys, 128 wide), random weights and few, narrow
blocks, so that a prompt's length is what it pays for; ``smollm2`` is SmolLM2-135M on the
language reference that comes with Python. Each way reads the
prompt and writes greedily by the model's own ``generate``; ways take turns in one process, and a ratio is of two ways
in the same round. Beside each ratio stands what is possible: of a prefill by counted FLOPs, of a step by the bytes of
weights and cache that it has to read.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria, StoppingCriteriaList

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment, interleave, now
from quickmerge.bench.stats import spread
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.merge.bench.cost import model_shape, plan_cost
from quickmerge.merge.run import cache_bytes
from quickmerge.merge.tokens import Schedule

HERE = Path(__file__).parent
SHAPES = ("llama-8b", "smollm2")
LENGTHS = {"llama-8b": (1024, 2048, 4096, 8192, 16384), "smollm2": (1024, 2048, 4096, 8064)}
"""Without ``--tokens``: what a CPU core reads in minutes, and what SmolLM2 was trained for."""
PLAIN = "plain"
Row = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """What one turn took."""

    prefill: float
    """Seconds until the first token was chosen."""
    step: float
    """Seconds for each token after it and each row."""
    cache: int
    """Bytes of keys and values at the end."""
    peak: int
    """Most bytes that a GPU held beyond what it held before; 0 on a CPU."""
    read: float
    """Share of the cache's rows that attention reads in a step."""
    passes: float
    """Tokens that a pass of the model brings, for each row."""


class Clock(StoppingCriteria):
    """Notes when a token, or several of one pass, has been chosen; stops nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: list[tuple[float, int]] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Note, and let the text go on."""
        self.seen.append((now(self.device), input_ids.shape[1]))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--tokens", type=int, nargs="+", help="lengths (default: what a CPU core reads in minutes)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16], help="more than 1 at the least length")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--new", type=int, default=24, help="tokens that are written")
    parser.add_argument("--rounds", type=int, default=3, help="one fewer for each doubling beyond 4,096, at least 1")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "curves.json")
    args = parser.parse_args()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    data = measured(args)
    write_json(args.out, data)
    from curve_tables import curves  # draws on tables, which a machine without the pages' tools need not have

    curves(data).print(Console())


def measured(args: argparse.Namespace) -> Row:
    """Everything that was asked for, as the result file holds it."""
    rows: list[Row] = []
    work = [
        (shape, tokens, batch)
        for shape in args.shapes
        for tokens in args.tokens or LENGTHS[shape]
        for batch in (args.batches if tokens == min(args.tokens or LENGTHS[shape]) else args.batches[:1])
        if shape != "smollm2" or tokens <= LENGTHS[shape][-1]
    ]
    with progress() as bar:
        task = bar.add_task("curves", total=len(work))
        model, name = None, ""
        for shape, tokens, batch in work:
            bar.update(task, description=f"{shape}, {tokens} tokens, batch {batch}")
            if shape != name:
                model = None
                (model, text), name = made(shape, args), shape
            rows += at(model, shape, prompt(text, tokens, batch).to(args.device), args)
            bar.update(task, advance=1)
    settings = {"keep": args.keep, "new": args.new, "dtype": args.dtype, "device": args.device}
    return {"rows": rows, "exponents": exponents(rows), "settings": settings, "environment": environment()}


def made(shape: str, args: argparse.Namespace) -> tuple[Any, Tensor]:
    """The model of a shape, and tokens to take prompts from."""
    dtype = getattr(torch, args.dtype)
    if shape == "smollm2":
        model, tokenizer = qm.load("smollm2-135m", dtype=dtype)
        ids = tokenizer(
            "\n\n".join(topics[key] for key in sorted(topics)), return_tensors="pt", add_special_tokens=False
        )["input_ids"][0]
        return model.to(args.device), ids
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=3584, num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, vocab_size=4096, max_position_embeddings=1 << 17, rope_theta=500_000.0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(device=args.device, dtype=dtype).eval()
    return model, torch.randint(4096, (1 << 17,), generator=torch.Generator().manual_seed(1))


def prompt(text: Tensor, tokens: int, batch: int) -> Tensor:
    """``(batch, tokens)``: stretches of a text that begin evenly spread over it."""
    room = len(text) - tokens
    return torch.stack([text[(room * row // batch) :][:tokens] for row in range(batch)])


def ways(model: Any, shape: str, keep: float, batch: int = 1) -> list[Arm]:
    """The plain model, each method alone, and together; drafts for one row whose text is one: random weights loop."""
    merge, attention, lookup = qm.QuickMerge(keep=keep), qm.Multipole(), qm.PromptLookup()
    parts: dict[str, dict[str, Any]] = {
        PLAIN: {},
        "merge": {"merge": merge},
        "Multipole": {"attention": attention},
        "merge, Multipole": {"merge": merge, "attention": attention},
    }
    if shape == "smollm2" and batch == 1:
        parts["lookup"] = {"decoding": lookup}
        parts["merge, lookup"] = {"merge": merge, "decoding": lookup}
        parts["merge, Multipole, lookup"] = {"merge": merge, "attention": attention, "decoding": lookup}
    return [Arm(name, partial(qm.apply, model, qm.Recipe(**each)), {}, each) for name, each in parts.items()]


def turn(model: Any, ids: Tensor, new: int, arm: Arm, least: bool = False) -> Found:
    """Let one way read and write once."""
    clock, cuda = Clock(ids.device), ids.device.type == "cuda"
    held = held_bytes(cuda, anew=True)
    with torch.inference_mode(), arm.context() as run:
        began = now(ids.device)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, return_dict_in_generate=True,
            max_new_tokens=2 if least else new, min_new_tokens=2 if least else new,
            stopping_criteria=StoppingCriteriaList([clock]),
        )  # fmt: skip
        peak = held_bytes(cuda) - held
        said = run.summary()
    (first, start), (last, end) = clock.seen[0], clock.seen[-1]
    read = said["attention"].read_share if "attention" in said else 1.0
    passes = (end - start) / max(1, len(clock.seen) - 1)
    cache = cache_bytes(out.past_key_values)
    return Found(first - began, (last - first) / max(1, end - start) / len(ids), cache, peak, read, passes)


def held_bytes(cuda: bool, anew: bool = False) -> int:
    """The most memory of the GPU that was held since it was asked anew; 0 without one.

    A CPU's allocator keeps what was freed, so the most that a process held says nothing of one turn.
    """
    if not cuda:
        return 0
    if anew:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated()


def at(model: Any, shape: str, ids: Tensor, args: argparse.Namespace) -> list[Row]:
    """All ways at one length and batch."""
    (batch, tokens), arms = ids.shape, ways(model, shape, args.keep, ids.shape[0])
    rounds = max(1, args.rounds - max(0, int(math.log2(max(1, tokens / 4096)))))
    found = interleave(
        arms, [ids], lambda arm, ids, number: turn(model, ids, args.new, arm), rounds=rounds,
        warm_up=lambda arm, ids, number: turn(model, ids[:, :1024], args.new, arm, least=True),
    )  # fmt: skip
    measure, schedule = model_shape(model), Schedule.of(None, model.config.num_hidden_layers)
    reducer = qm.QuickMerge(keep=args.keep)
    weights = sum(each.numel() * each.element_size() for each in model.parameters())
    whole = median(each.cache for each in found[0])
    rows = []
    for arm, each in zip(arms, found, strict=True):
        merged = "merge" in arm.ingredients
        read = weights + median(one.cache * one.read for one in each)
        rows.append({
            "shape": shape, "tokens": tokens, "batch": batch, "way": arm.name, "rounds": rounds,
            "prefill_seconds": median(one.prefill for one in each),
            **spread("prefill_speedup", [a.prefill / b.prefill for a, b in zip(found[0], each, strict=True)]),
            "prefill_allowed": plan_cost(measure, reducer, schedule, tokens).speedup if merged else 1.0,
            "step_seconds": median(one.step for one in each),
            **spread("step_speedup", [a.step / b.step for a, b in zip(found[0], each, strict=True)]),
            "step_allowed": (weights + whole) / read * median(one.passes for one in each),
            "tokens_a_pass": median(one.passes for one in each),
            "cache_bytes": median(one.cache for one in each),
            **({"peak_bytes": median(one.peak for one in each)} if ids.is_cuda else {}),
            "read_share": median(one.read for one in each),
        })  # fmt: skip
    return rows


def exponents(rows: Sequence[Row]) -> list[Row]:
    """How seconds grow: the slope of their logarithms between the two longest prompts, and over all of them."""
    made = []
    for shape, way in dict.fromkeys((row["shape"], row["way"]) for row in rows):
        own = [row for row in rows if (row["shape"], row["way"]) == (shape, way) and row["batch"] == 1]
        own.sort(key=lambda row: row["tokens"])
        if len(own) > 1:
            made.append({
                "shape": shape, "way": way, "tokens": [row["tokens"] for row in own],
                **{f"{key}_{name}": slope(part, f"{key}_seconds") for key in ("prefill", "step")
                   for name, part in (("all", own), ("end", own[-2:]))},
            })  # fmt: skip
    return made


def slope(rows: Sequence[Row], key: str) -> float:
    """The exponent of a power of the length by least squares."""
    x = [math.log(row["tokens"]) for row in rows]
    y = [math.log(row[key]) for row in rows]
    middle = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return top / sum((a - middle[0]) ** 2 for a in x)


if __name__ == "__main__":
    main()
