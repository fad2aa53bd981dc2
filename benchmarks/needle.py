"""A fact in the middle of a long text: is it still there when the question comes last?

    python benchmarks/documents.py && python benchmarks/needle.py

Text that goes on hardly needs its own middle, so context recovery is kind to whoever keeps the most recent tokens.
Here each held-out document carries one invented sentence (a five-digit code), at a depth that cycles through it, and
ends in a question for it. Scored is the code after the question: its NLL, and whether every digit is the model's
first choice. Writes benchmarks/results/prior_needle.json. `quickmerge bench tasks` asks more, and in more ways.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tables
import torch
from rich.console import Console
from rich.progress import track
from torch.nn.functional import cross_entropy

from quickmerge.bench.harness import environment
from quickmerge.bench.quality import continuation_logits
from quickmerge.console.options import parse_layer, quiet, write_json
from quickmerge.merge.attach import reduce
from quickmerge.merge.bench.cost import model_shape
from quickmerge.merge.cli.options import add_prior
from quickmerge.merge.reducers import make_reducer
from quickmerge.merge.run import observe
from quickmerge.models import cache_folder, load

HERE = Path(__file__).parent
DEPTHS = (0.1, 0.3, 0.5, 0.7)
PLACES = ("Sellay", "Brannick", "Tormund", "Avella", "Corrin", "Haldane", "Pellworm", "Marrow", "Dunmore", "Ystad")


def build(tokenizer: Any, text: str, length: int, depth: float, seed: int) -> tuple[list[int], list[int]]:
    """Token ids of a prompt of ``length`` tokens that hides a fact and asks for it, and of the answer."""
    draw = random.Random(seed)
    place, code = draw.choice(PLACES), "".join(draw.choice("0123456789") for _ in range(5))

    def ids(part: str) -> list[int]:
        found: list[int] = tokenizer(part, add_special_tokens=False)["input_ids"]
        return found

    fact = ids(f"\nNote: the access code of the {place} office is {code}.\n")
    asked = ids(f"\n\nQuestion: what is the access code of the {place} office?\nAnswer: the access code of the "
                f"{place} office is")  # fmt: skip
    filler = ids(text[: 64 * length])[: length - len(fact) - len(asked)]
    at = int(depth * len(filler))
    return filler[:at] + fact + filler[at:] + asked, ids(f" {code}")


def score(model: Any, prompt: Sequence[int], answer: Sequence[int], run: Any) -> tuple[float, bool]:
    """Mean NLL of the answer's tokens, and whether each is the most probable one."""
    # The last token of the prompt is read after the reduced part, so that it predicts the first of the answer.
    context, rest = torch.tensor([prompt[:-1]]), torch.tensor([[prompt[-1], *answer]])
    logits, wanted = continuation_logits(model, context, rest, run)[0].cpu(), rest[0, 1:]
    return float(cross_entropy(logits.float(), wanted)), bool((logits.argmax(-1) == wanted).all())


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=Path, default=None)
    parser.add_argument("--split", default="test", choices=["test", "dev"])
    parser.add_argument("--reducer", default="quickmerge,quickmerge:recency=0.5,attention,truncate,random")
    parser.add_argument("--keep", default="0.2,0.42,0.6")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--layer", type=parse_layer, default=None)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--prior", default=None, help="measure quickmerge with this prior too, a folder or a name")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prior_needle.json")
    args = parser.parse_args()
    quiet()
    folder = args.documents or cache_folder(None) / "documents"
    files = sorted((folder / args.split).rglob("*.txt"))
    model, tokenizer = load(args.model)
    shape = model_shape(model)
    found: dict[tuple[str, float], list[tuple[float, bool, float]]] = {}
    for i, path in enumerate(track(files, "documents")):
        text = path.read_text(encoding="utf-8")
        prompt, answer = build(tokenizer, text, args.tokens, DEPTHS[i % len(DEPTHS)], i)
        found.setdefault(("full", 1.0), []).append((*score(model, prompt, answer, observe(model)), 1.0))
        for keep in map(float, args.keep.split(",")):
            methods = [make_reducer(name, keep=keep) for name in args.reducer.split(",")]
            if args.prior is not None:
                methods += [add_prior(method, args.prior) for method in methods if method.name == "quickmerge"]
            for reducer in methods:
                name = reducer.label
                run = reduce(model, reducer, args.layer, min_tokens=0)
                nll, right = score(model, prompt, answer, run)
                stats = run.summary()
                ratio = shape.flops_ratio(reducer, stats.tokens_per_layer, stats.tokens_in)
                found.setdefault((name, keep), []).append((nll, right, ratio))
    rows = []
    for (name, keep), values in found.items():
        nlls, rights, ratios = zip(*values, strict=True)
        rows.append({
            "reducer": name, "keep": keep, "documents": len(values), "nll": sum(nlls) / len(nlls),
            "exact": sum(rights) / len(rights), "flops_ratio": sum(ratios) / len(ratios),
            "exact_by_depth": {f"{d:g}": sum(rights[j :: len(DEPTHS)]) / len(rights[j :: len(DEPTHS)])
                               for j, d in enumerate(DEPTHS)},
        })  # fmt: skip
    write_json(args.out, {"rows": rows, "environment": environment(), "settings": {
        "model": args.model, "tokens": args.tokens, "split": args.split, "layer": args.layer,
    }})  # fmt: skip
    tables.needle(rows).print(Console())


if __name__ == "__main__":
    main()
