"""What the ingredients of a recipe save of a real model, each alone and together (benchmarks/results/recipes.json).

    python benchmarks/documents.py && python benchmarks/recipes.py [--dtype float32 bfloat16] [--threads 2 1]

A number is hidden in a document, in a sentence of its own, and the prompt ends with that sentence begun anew: the
question stands last, and the answer quotes the prompt. Behind the number the model goes on as it likes, which is mostly
to quote lines of the document. Every way to answer takes its turn at every document. Seconds are those of ``generate``,
everything that an ingredient does itself included; only the timing of passes that speculative decoding does once for
each length of text, to choose its trees, is told apart.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import median
from typing import Any

import torch
from multipole_texts import pieces
from rich.console import Console
from torch import Tensor

import quickmerge as qm
from quickmerge.bench.harness import environment, interleave
from quickmerge.bench.stats import spread
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.answer import FirstToken
from quickmerge.merge.place import Merge
from quickmerge.models import cache_folder
from quickmerge.models.compat import returned_cache

HERE = Path(__file__).parent
FACT = "\n\nThe code of the {place} office is"
"""What the prompt ends with; in the document the code follows, and a full stop."""
PLACES = ("Lisbon", "Oslo", "Vienna", "Dublin")
RECENT = 32
"""Tokens at the end of a prompt that stay alone: the question."""
LENGTHS = {2048: 64, 4096: 128, 6144: 256}
"""Tokens of the prompt, and of the answer to it."""


@dataclass(frozen=True)
class Quote:
    """A prompt ``(1, N)``, the number that should follow it, and how many tokens are written."""

    name: str
    prompt: Tensor
    code: str
    new: int


@dataclass(frozen=True)
class Arm:
    """A way to answer; None is the model as it is."""

    name: str
    recipe: qm.Recipe | None


@dataclass(frozen=True)
class Taken:
    """One answer and what it took; seconds."""

    ids: Tensor
    first: float
    rest: float
    measuring: float
    cache_bytes: int
    tokens_per_pass: float
    right: bool


def arms(keep: float, budget: int) -> list[Arm]:
    """Plain, each ingredient, and all of them together in pairs and in three."""
    merge = Merge(qm.QuickMerge(keep=keep), mode=qm.Prefix(recent=RECENT))
    attention, lookup = qm.Multipole(budget=budget), qm.PromptLookup()
    made = {
        "merge": qm.Recipe(merge=merge),
        "multipole": qm.Recipe(attention=attention),
        "lookup": qm.Recipe(decoding=lookup),
        "merge + multipole": qm.Recipe(merge=merge, attention=attention),
        "merge + lookup": qm.Recipe(merge=merge, decoding=lookup),
        "multipole + lookup": qm.Recipe(attention=attention, decoding=lookup),
        "all three": qm.Recipe(merge=merge, attention=attention, decoding=lookup),
    }
    return [Arm("plain", None), *(Arm(name, recipe) for name, recipe in made.items())]


def quotes(tokenizer: Any, folder: Path, tokens: int, new: int, count: int) -> list[Quote]:
    """Prompts of about ``tokens`` tokens whose number stands at 30 % to 70 % of their document."""
    found = []
    for number, piece in enumerate(pieces(tokenizer, folder, tokens - 40, count)):
        at = int(piece.ids.shape[1] * (0.3 + 0.4 * number / max(1, count - 1)))
        fact, code = FACT.format(place=PLACES[number % len(PLACES)]), str(Random(number).randint(10000, 99999))
        told, asked = (
            tokenizer(each, add_special_tokens=False, return_tensors="pt")["input_ids"]
            for each in (f"{fact} {code}.\n\n", fact)
        )
        prompt = torch.cat([piece.ids[:, :at], told, piece.ids[:, at:], asked], 1)
        found.append(Quote(piece.name, prompt, code, new))
    return found


def answer(model: Any, tokenizer: Any, arm: Arm, quote: Quote) -> Taken:
    """Let an arm answer, and take the time."""
    new, held = quote.new, []
    hook = model.base_model.register_forward_hook(lambda module, args, out: held.append(returned_cache(out)))
    run = nullcontext() if arm.recipe is None else qm.apply(model, arm.recipe)
    clock = FirstToken()
    try:
        with torch.inference_mode(), run as inside:
            began = time.perf_counter()
            out = model.generate(
                quote.prompt, attention_mask=torch.ones_like(quote.prompt), max_new_tokens=new, min_new_tokens=new,
                do_sample=False, pad_token_id=0, stopping_criteria=[clock],
            )  # fmt: skip
            whole = time.perf_counter() - began
    finally:
        hook.remove()
    told = inside.summary() if inside is not None else {}
    drafted = told["decoding"] if arm.recipe is not None and arm.recipe.speculation is not None else None
    measuring = 0.0 if drafted is None else drafted.measure_seconds
    behind = 0.0 if drafted is None else drafted.measure_behind_seconds
    first = clock.seconds - (measuring - behind)
    ids = out[0, quote.prompt.shape[1] :]
    right = tokenizer.decode(ids[:16]).strip().startswith(quote.code)
    return Taken(
        ids, first, whole - clock.seconds - behind, measuring,
        sum(_bytes(layer) for layer in held[-1].layers), 1.0 if drafted is None else drafted.tokens_per_pass,
        right,
    )  # fmt: skip


def _bytes(layer: Any) -> int:
    clusters = getattr(layer, "clusters", None)
    pairs = sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return pairs + (0 if clusters is None else clusters.bytes)


def rows_of(ways: Sequence[Arm], items: Sequence[Quote], taken: list[list[Taken]], where: dict[str, Any]) -> Any:
    """A row for each arm, with ratios to the plain model within the same document."""
    plain = taken[0]
    for arm, found in zip(ways, taken, strict=True):
        pairs = list(zip(found, plain, strict=True))
        new = items[0].new
        yield {
            **where, "arm": arm.name, "recipe": None if arm.recipe is None else arm.recipe.as_dict(),
            "documents": len(items), "new": new,
            **spread("first_seconds", [one.first for one in found]),
            **spread("tokens_per_second", [(new - 1) / one.rest for one in found]),
            **spread("seconds", [one.first + one.rest for one in found]),
            "measuring_seconds": median(one.measuring for one in found),
            **spread("prefill_speedup", [base.first / one.first for one, base in pairs]),
            **spread("decode_speedup", [base.rest / one.rest for one, base in pairs]),
            **spread("speedup", [(base.first + base.rest) / (one.first + one.rest) for one, base in pairs]),
            "cache_bytes": median(one.cache_bytes for one in found),
            "cache_ratio": median(one.cache_bytes / base.cache_bytes for one, base in pairs),
            "tokens_per_pass": median(one.tokens_per_pass for one in found),
            "exact": sum(one.right for one in found),
            "same_as_plain": sum(bool(torch.equal(one.ids, base.ids)) for one, base in pairs),
        }  # fmt: skip


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS), help="of the prompt")
    parser.add_argument("--count", type=int, nargs="+", default=[3, 1, 1], help="documents of each length")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recipes.json")
    args = parser.parse_args()
    quiet()
    rows: list[dict[str, Any]] = []
    ways = arms(args.keep, args.budget)
    meta = {"model": args.model, "keep": args.keep, "budget": args.budget, "recent": RECENT}
    try:
        folder = (args.documents or cache_folder() / "documents") / "test"
        with progress() as bar:
            turns = len(args.dtype) * len(args.threads) * sum(args.count) * len(ways)
            task = bar.add_task("answering", total=turns)
            for dtype in args.dtype:
                model, tokenizer = qm.load(args.model, dtype=dtype)
                for threads in args.threads:
                    torch.set_num_threads(threads)
                    warm = quotes(tokenizer, folder, 512, 8, 1)[0]
                    for arm in ways:
                        answer(model, tokenizer, arm, warm)
                    for tokens, count in zip(args.tokens, args.count, strict=True):
                        where = {"dtype": dtype, "threads": threads, "tokens": tokens}
                        bar.update(task, description=f"{tokens} tokens, {dtype}, {threads} thread(s)")
                        items = quotes(tokenizer, folder, tokens, LENGTHS.get(tokens, 64), count)

                        def measure(arm: Arm, item: Quote, number: int, opened: Any = (model, tokenizer)) -> Taken:
                            bar.update(task, advance=1)
                            return answer(*opened, arm, item)

                        rows += rows_of(ways, items, interleave(ways, items, measure), where)
                        write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    except QuickmergeError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
