"""What each part of the prior is worth: short trainings that differ in one thing (results/prior_ablation.json).

python benchmarks/documents.py && python benchmarks/training_text.py && python benchmarks/prior_ablation.py [--steps N]

Every variant trains for the same steps on the same windows and is measured on the development documents, which no
training has seen. The shipped prior trains longer, so these numbers compare parts and not the end result. A variant
that was trained before is not trained again: delete its folder below --work to do so.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.console.options import quiet
from quickmerge.datasets import TextWindows, find_data
from quickmerge.datasets.text import split_document
from quickmerge.merge.prior import Prior, QuickMergePrior
from quickmerge.merge.prior.train_text import Weights, train_prior_text
from quickmerge.models import cache_folder
from quickmerge.training import TrainingConfig

HERE = Path(__file__).parent
VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "forward only": {"directions": "forward"},
    "no next-slot loss": {"weights": Weights(ar=0.0)},
    "no alignment": {"depths": []},
    "alignment at block 8 only": {"depths": [8]},
    "no learned saliency": {"saliency": False},
    "mixture head": {"head": "mixture"},
    "energy head": {"head": "energy"},
}


def main() -> int:
    """Train the variants, then measure them on the same documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.2])
    parser.add_argument("--work", type=Path, default=Path("runs/prior_ablation"))
    parser.add_argument("--only", nargs="+", default=list(VARIANTS))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "prior_ablation.json")
    args = parser.parse_args()
    quiet()
    say = Console(stderr=True)
    model, tokenizer = qm.load("smollm2-135m")
    model = model.to(torch.bfloat16)
    texts = find_data([cache_folder() / "training" / "train"]).files
    files = sorted((cache_folder() / "documents" / "dev").rglob("*.txt"))
    held_out = [tokenizer(f.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"] for f in files]
    windows = TextWindows(tokenizer, texts, 1216, held_out=held_out)
    config = TrainingConfig(
        steps=args.steps, batch=2, learning_rate=1e-3, warmup=min(30, args.steps // 4), final=0.05, betas=(0.9, 0.95),
        precision="bf16", save_every=20,
    )  # fmt: skip
    priors: dict[str, Prior] = {}
    memory: dict[bytes, torch.Tensor] = {}
    for name in args.only:
        out = args.work / name.replace(" ", "-")
        if not (out / "config.json").is_file():
            say.print(f"training: {name}", highlight=False)
            train_prior_text(
                model, windows, config, out, name="smollm2-135m", keeps=args.keep, context=1024,
                resume=(out / "checkpoints").is_dir(), memory=memory, **VARIANTS[name],
            )  # fmt: skip
        priors[name] = Prior.from_pretrained(out)
    documents = [split_document(tokenizer, f.read_text(encoding="utf-8"), f.name, kind=f.parent.name) for f in files]
    full, none = [], []
    found: dict[tuple[str, float], list[float]] = {}
    for document in track(documents, "measuring", transient=True, console=say):
        full.append(float(document_nll(model, document).mean()))
        none.append(float(continuation_nll(model, document.nothing, document.target, nullcontext()).mean()))
        for keep in args.keep:
            ways: dict[str, Any] = {"no prior": qm.QuickMerge(keep=keep)}
            ways |= {name: QuickMergePrior.from_prior(prior, keep=keep) for name, prior in priors.items()}
            for name, way in ways.items():
                nll = document_nll(model, document, qm.reduce(model, way, min_tokens=0))
                found.setdefault((name, keep), []).append(float(nll.mean()))
    rows = []
    for (name, keep), nll in found.items():
        score, plain = recovery(nll, full, none), found["no prior", keep]
        gain = sum(p - n for p, n in zip(plain, nll, strict=True))
        lost = sum(p - f for p, f in zip(plain, full, strict=True))
        rows.append({"variant": name, "keep": keep, "recovery": score.recovery, "recovery_low": score.low,
                     "recovery_high": score.high, "nll": score.nll, "won_back": gain / lost})  # fmt: skip
    meta = {"model": "smollm2-135m, bfloat16", "steps": args.steps, "batch": 2, "documents": len(documents),
            "split": "dev", "environment": environment()}  # fmt: skip
    args.out.write_text(json.dumps({"rows": rows, "meta": meta}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
