"""What survives of a context where a model comes in float32, in bfloat16, in int8, or with an adapter.

    python benchmarks/documents.py && python benchmarks/how_models_come.py

SmolLM2-135M-Instruct in four forms, each against its own NLL with all of the context and with none, so that what a form
itself costs is told apart from what merging costs: float32; bfloat16; int8, which is torch's dynamic quantisation of
every linear layer, the head among them, with activations in int8 too; and bfloat16 with a LoRA adapter (rank 8 on
queries and values) that was trained for a few dozen steps on texts of the training set, so that its weights are no
longer those of the model. Three held-out documents of each kind. Every measurement is written down as it comes, so that
a run goes on where it was stopped, and ``--only float32`` and so on may run side by side; a run without it joins them.
The rows are over the documents that all forms were measured on. Needs the package peft. Writes
benchmarks/results/how_models_come.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.bench.quality import continuation_nll, document_nll, recovery
from quickmerge.bench.records import Records
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.text import Document, split_document
from quickmerge.models import cache_folder, load
from quickmerge.sampling import evenly

HERE = Path(__file__).parent
OUT = HERE / "results" / "how_models_come.json"
Row = dict[str, Any]
MODEL = "smollm2-135m"
CONTEXT, TARGET = 1024, 192
KEEPS = (0.42, 0.2)
RANK, STEPS, LENGTH, RATE = 8, 24, 128, 2e-3
"""Of the adapter: its rank, and steps, tokens a step and learning rate of its training."""
FORMS = ("float32", "bfloat16", "int8, dynamic", "bfloat16, LoRA")


def quantised(model: Any) -> Any:
    """A copy of a model whose linear layers hold int8 weights and compute in int8."""
    from torch.ao.quantization import quantize_dynamic

    return quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def adapted(model: Any, tokenizer: Any, texts: Sequence[Path], advance: Callable[[], None]) -> Any:
    """A model with a LoRA adapter, trained on a window of one text after the other."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    adapter = get_peft_model(model, config)
    weights = [p for p in adapter.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.0)
    for step in range(STEPS):
        body = texts[step % len(texts)].read_text(encoding="utf-8")
        start = step * 1009 % max(1, len(body) - 8 * LENGTH)
        ids = tokenizer(body[start : start + 8 * LENGTH], return_tensors="pt")["input_ids"][:, :LENGTH]
        adapter(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance()
    return adapter.eval()


def comes_as(form: str, texts: Sequence[Path], advance: Callable[[], None]) -> Any:
    """The model in one of its forms."""
    model, tokenizer = load(MODEL, dtype=torch.bfloat16 if form.startswith("bfloat16") else torch.float32)
    if form.startswith("int8"):
        return quantised(model)
    return adapted(model, tokenizer, texts, advance) if form.endswith("LoRA") else model


def measure(model: Any, tokenizer: Any, form: str, document: Document) -> list[Row]:
    """The records of a form on a document, one for each keep."""
    full = float(document_nll(model, document).mean())
    none = float(continuation_nll(model, document.nothing, document.target, nullcontext()).mean())
    rows = []
    for keep in KEEPS:
        run = qm.reduce(model, qm.QuickMerge(keep=keep), min_tokens=0, tokenizer=tokenizer)
        nll = float(document_nll(model, document, run).mean())
        rows.append({
            "document": document.name, "kind": document.kind, "form": form, "keep": keep, "nll": nll,
            "nll_full": full, "nll_none": none, "tokens_kept": run.summary().tokens_kept,
        })  # fmt: skip
    return rows


def rows_of(documents: Sequence[Document], records: dict[str, Records]) -> tuple[list[Row], list[Row]]:
    """A row for each form and keep over the documents that all were measured on; and these measurements."""
    cells = [(form, keep) for keep in KEEPS for form in FORMS]
    whole = [d.name for d in documents if all(records[form].get(d.name, keep) for form, keep in cells)]
    rows, each = [], []
    for form, keep in cells:
        mine = [records[form].get(name, keep) or {} for name in whole]
        score = recovery([r["nll"] for r in mine], [r["nll_full"] for r in mine], [r["nll_none"] for r in mine])
        rows.append({
            "form": form, "keep": keep, "documents": len(whole), "recovery": score.recovery,
            "recovery_low": score.low, "recovery_high": score.high, "nll": score.nll, "nll_full": score.nll_full,
            "nll_none": score.nll_none,
        })  # fmt: skip
        each += mine
    return rows, each


def main() -> None:
    """Measure, and write the rows of the documents that were measured in all forms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=Path, help="folder of held-out texts; default: the cache folder's")
    parser.add_argument("--training", type=Path, help="folder of texts for the adapter; default: the cache folder's")
    parser.add_argument("--work", type=Path, help="folder for what was measured; default: in the cache folder")
    parser.add_argument("--only", choices=FORMS, help="measure one form, and write no rows")
    parser.add_argument("--join", action="store_true", help="write the rows of what was measured so far, and no more")
    args = parser.parse_args()
    quiet()
    cache = cache_folder(None)
    tokenizer = load(MODEL, dtype=torch.bfloat16)[1]
    paths = sorted((args.documents or cache / "documents" / "test").rglob("*.txt"))
    found = [
        split_document(tokenizer, p.read_text(encoding="utf-8"), p.stem, context=CONTEXT, target=TARGET,
                       kind=p.parent.name) for p in paths
    ]  # fmt: skip
    some = [evenly([d for d in found if d.kind == kind], 3) for kind in sorted({str(d.kind) for d in found})]
    documents = [document for turn in zip(*some, strict=True) for document in turn]
    settings = {"model": MODEL, "context": CONTEXT, "target": TARGET, "lora": [RANK, STEPS, LENGTH, RATE]}
    work = args.work or cache / "how_models_come"
    records = {
        form: Records(work / f"{form.replace(', ', '-')}.jsonl", {**settings, "form": form}, ("document", "keep"))
        for form in FORMS if args.only in (None, form)
    }  # fmt: skip
    if not args.join:
        texts = evenly(sorted((args.training or cache / "training" / "train").rglob("*.txt")), STEPS)
        with progress() as bar:
            task = bar.add_task("training the adapter", total=STEPS + len(documents) * len(records))
            models = {form: comes_as(form, texts, lambda: bar.update(task, advance=1)) for form in records}
            for document in documents:
                for form, model in models.items():
                    bar.update(task, advance=1, description=f"{document.name}: {form}")
                    if records[form].get(document.name, KEEPS[-1]) is None:
                        for record in measure(model, tokenizer, form, document):
                            records[form].add(record)
    if args.only is None:
        rows, each = rows_of(documents, records)
        write_json(OUT, {"rows": rows, "documents": each, "environment": environment(), **settings})
        Console().print(f"{rows[0]['documents']} documents: {OUT}", markup=False)


if __name__ == "__main__":
    main()
