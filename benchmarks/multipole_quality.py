"""What multipole attention loses: on long texts, on spans that come twice, and while generating.

python benchmarks/documents.py && python benchmarks/multipole_quality.py [context] [retrieval] [generation]

- context: a text's last 128 tokens are predicted after all before them, by attention of many kinds on the same cache.
- retrieval: a span of random tokens comes again after 1,000 to 7,000 tokens of text.
- generation: a text that the model wrote with its full attention is read again, its clusters updated or not.

Each writes benchmarks/results/multipole_PART.json. What was measured is noted document by document beside it, so that a
run that was broken off goes on where it was when it is started again with the same settings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from multipole_arms import ALL, USUAL, context_arms, dense, retrieval_arms
from multipole_steps import generation_arms
from multipole_texts import Copied, Piece, copied, pieces, written
from notes import Notes
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment
from quickmerge.bench.table import Column, Table, number, text
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder
from quickmerge.models.compat import cache_argument
from quickmerge.models.identity import model_hash
from quickmerge.multipole.run import MultipoleRun

HERE = Path(__file__).parent
PARTS = ("context", "retrieval", "generation")
Record = dict[str, Any]
Work = dict[str, Callable[[], list[Record]]]
KEYS = ("name", "budget", "settings", "length", "quarter")
"""What tells the rows of a result apart."""


def filled(model: Any, ids: Tensor) -> tuple[qm.MultipoleCache, Tensor]:
    """A cache that holds ``ids (1, N)``, read by the model's own attention, and the logits ``(V,)`` of what follows."""
    cache = qm.MultipoleCache(model.config)
    # Inside a run that wants them, positions are noted; the prompt is read by the model's own attention all the same.
    with torch.inference_mode(), qm.multipole(model, space="windowed"):
        logits = model(ids, **cache_argument(model, cache), use_cache=True, logits_to_keep=1).logits
    return cache, logits[0, -1].float()


def read(model: Any, cache: qm.MultipoleCache, inputs: Tensor, arm: Arm) -> tuple[Tensor, float | None]:
    """Logits ``(q, V)`` after each of ``inputs (1, q)``, and clustered keys read exactly where that is counted."""
    with torch.inference_mode(), arm.context(model, cache) as run:
        logits: Tensor = model(inputs, **cache_argument(model, cache), use_cache=True).logits[0].float()
    return logits, run.summary().kept if isinstance(run, MultipoleRun) else None


def compared(model: Any, cache: qm.MultipoleCache, inputs: Tensor, wanted: Tensor, arms: Sequence[Arm]) -> list[Record]:
    """Every arm on the same cache, which is left as it was; the first arm is the model's own attention."""
    records: list[Record] = []
    own = torch.empty(0)
    for arm in arms:
        logits, kept = read(model, cache, inputs, arm)
        cache.crop(-inputs.shape[1])
        own = own if records else logits
        record = {**told(arm), "kept": kept, **scores(logits, own, wanted)}
        records.append({**record, "extra": record["nll"] - (records or [record])[0]["nll"]})
    return records


def told(arm: Arm) -> Record:
    """The arm in the results: its name, its budget, and the settings that are not the usual ones."""
    usual = asdict(USUAL)
    own = {
        k: v
        for k, v in asdict(arm.settings["multipole"]).items()
        if v != usual[k] and k not in ("budget", "replacement")
    }
    if "select" in own:
        own["top_p"] = arm.settings["multipole"].top_p
    return {"name": arm.name, "budget": arm.settings["budget"], "settings": own}


def scores(logits: Tensor, own: Tensor, wanted: Tensor) -> Record:
    """Nats per token, nats from the model's own distribution, and how often the first choice is its and the right one.

    ``logits (q, V)``, ``own (q, V)`` those of the model's own attention, ``wanted (q,)``.
    """
    logp, full = logits.log_softmax(-1), own.log_softmax(-1)
    first = logits.argmax(-1)
    return {
        "nll": float(cross_entropy(logits, wanted)),
        "kl": float((full.exp() * (full - logp)).sum(-1).mean()),
        "agreement": float((first == own.argmax(-1)).float().mean()),
        "right": float((first == wanted).float().mean()),
    }


def context_records(model: Any, piece: Piece, target: int, arms: Sequence[Arm]) -> list[Record]:
    """The last ``target`` tokens of a piece, read at once after all before them."""
    ids = piece.ids
    cut = ids.shape[1] - target
    cache, _ = filled(model, ids[:, : cut - 1])
    found = compared(model, cache, ids[:, cut - 1 : -1], ids[0, cut:], arms)
    return [{**record, "length": ids.shape[1], "kind": piece.kind} for record in found]


def retrieval_records(model: Any, copy: Copied, arms: Sequence[Arm]) -> list[Record]:
    """A span's second copy without its first token; beside it, by full attention, a span that was never there."""
    cache, _ = filled(model, copy.context)
    found = compared(model, cache, copy.span[:, :-1], copy.span[0, 1:], arms)
    unseen = compared(model, cache, copy.other[:, :-1], copy.other[0, 1:], [dense("dense, another span")])
    return [{**record, "length": copy.filler, "kind": copy.kind} for record in found + unseen]


def generation_records(model: Any, piece: Piece, args: argparse.Namespace) -> list[Record]:
    """What the model wrote after the beginning of a piece, read in steps of as many tokens as are clustered at once.

    The prompt is so long that the buffer is at its shortest behind it. Then reading ``interval`` tokens at once, with
    an update in front of them, shows each token the very clusters that it would see if it were generated alone.
    """
    prompt = piece.ids[:, : USUAL.sink + USUAL.interval * args.prompt]
    text = written(model, prompt, args.written, temperature=0.8, top_p=0.95, seed=0)
    records: list[Record] = []
    own: list[Tensor] = []
    for name, arm, prepare in generation_arms(args.few):
        cache, after = filled(model, prompt)
        logits, buffers = [after[None]], []
        for inputs in text[:, :-1].split(USUAL.interval, 1):
            prepare(cache, arm.settings["multipole"])
            logits.append(read(model, cache, inputs, arm)[0])
            clusters = cache.layers[0].clusters
            buffers.append(cache.get_seq_length() - (int(clusters.end[0]) if clusters is not None else 0))
        whole = torch.cat(logits)
        own = own or [whole]
        for quarter in range(4):
            part = slice(quarter * args.written // 4, (quarter + 1) * args.written // 4)
            found = scores(whole[part], own[0][part], text[0, part])
            found["extra"] = found["nll"] - (records[quarter] if len(records) > 3 else found)["nll"]
            about = {**told(arm), "name": name, "quarter": quarter + 1, "buffer": max(buffers), "kind": piece.kind}
            records.append({**about, **found})
    return records


def rows_of(records: Sequence[Record]) -> list[Record]:
    """Means over documents, with their standard deviations, of each arm (and length, or quarter)."""
    grouped: dict[str, list[Record]] = {}
    for record in records:
        grouped.setdefault(json.dumps([record.get(key) for key in KEYS]), []).append(record)
    rows = []
    for mine in grouped.values():
        row: Record = {key: mine[0][key] for key in KEYS if key in mine[0]} | {"documents": len(mine)}
        for key in ("nll", "extra", "kl", "agreement", "right", "kept", "buffer"):
            values = [record[key] for record in mine if record.get(key) is not None]
            if values:
                row[key] = statistics.fmean(values)
                row[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return rows


def work_of(part: str, model: Any, tokenizer: Any, folder: Path, args: argparse.Namespace) -> Work:
    """What is to be measured, document by document."""
    budgets, work = tuple(args.budgets), {}
    if part == "context":
        for length, count in zip(args.tokens, args.count, strict=True):
            for piece in pieces(tokenizer, folder, length, count):
                key = f"{length} {piece.kind} {piece.name}"
                work[key] = partial(context_records, model, piece, args.target, context_arms(budgets))
    elif part == "retrieval":
        for filler in args.filler:
            for copy in copied(tokenizer, folder, filler, args.span, args.copies):
                key = f"{filler} {copy.kind} {copy.name}"
                work[key] = partial(retrieval_records, model, copy, retrieval_arms(budgets))
    else:
        length = USUAL.sink + USUAL.interval * args.prompt
        for piece in pieces(tokenizer, folder, length, args.texts):
            work[f"{piece.kind} {piece.name}"] = partial(generation_records, model, piece, args)
    return work


def measure(part: str, model: Any, tokenizer: Any, folder: Path, args: argparse.Namespace) -> None:
    """Measure a part and write its result."""
    work = work_of(part, model, tokenizer, folder, args)
    shown = {key: value for key, value in vars(args).items() if key not in ("parts", "documents", "out")}
    out = args.out / f"multipole_{part}.json"
    settings = {"part": part, "hash": model_hash(model), "documents": list(work), **shown}
    notes = Notes(out.with_suffix(".partial.jsonl"), settings)
    with progress() as bar:
        task = bar.add_task(part, total=len(work), completed=len(notes.done))
        for key, run in work.items():
            if key not in notes.done:
                bar.update(task, description=f"{part}: {key[:40]}")
                notes.add(key, run())
                bar.update(task, advance=1)
    records = [{**record, "document": key} for key in work for record in notes.done[key]]
    rows = rows_of(records)
    write_json(out, {"rows": rows, "documents": records, "settings": shown, "environment": environment()})
    notes.remove()
    show(part, rows)


def show(part: str, rows: Sequence[Record]) -> None:
    """Print the rows."""
    columns = [
        Column("length or quarter", lambda r: str(r.get("length", r.get("quarter")))),
        Column("attention", text("name"), "l"),
        Column("budget", lambda r: {None: "", ALL: "all"}.get(r["budget"], str(r["budget"]))),
        Column("settings", lambda r: " ".join(f"{k}={v}" for k, v in r["settings"].items()), "l"),
        Column("kept", number("kept", ".0f")), Column("NLL", number("nll", ".3f")), Column("KL", number("kl", ".4f")),
        Column("agreement", number("agreement", ".3f")),
    ]  # fmt: skip
    Table(columns, rows).print(Console(), title=part)


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled")
    parser.add_argument("--split", default="test", choices=["test", "dev"])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--budgets", type=int, nargs="+", default=[0, 64, 128, 512])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192], help="context: of each text")
    parser.add_argument("--count", type=int, nargs="+", default=[6, 6, 3], help="context: texts of each length")
    parser.add_argument("--target", type=int, default=128, help="context: tokens that are predicted")
    parser.add_argument("--filler", type=int, nargs="+", default=[1024, 3072, 7168], help="retrieval: tokens between")
    parser.add_argument("--copies", type=int, default=6, help="retrieval: texts of each length")
    parser.add_argument("--span", type=int, default=64, help="retrieval: tokens that come twice")
    parser.add_argument("--few", type=int, nargs="+", default=[64, 128], help="generation: budgets")
    parser.add_argument("--texts", type=int, default=6, help="generation: texts")
    parser.add_argument("--prompt", type=int, default=8, help="generation: times 128 tokens that are given")
    parser.add_argument("--written", type=int, default=1024, help="generation: tokens that the model writes")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the results")
    args = parser.parse_args()
    parts = args.parts or PARTS
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"parts must be of {', '.join(PARTS)}, got {unknown[0]}")
    if len(args.tokens) != len(args.count):
        parser.error(f"--count must be as many numbers as --tokens, got {len(args.count)} and {len(args.tokens)}")
    quiet()
    try:
        model, tokenizer = qm.load(args.model)
        folder = (args.documents or cache_folder() / "documents") / args.split
        for part in parts:
            measure(part, model, tokenizer, folder, args)
    except QuickmergeError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
