"""CALMs beside ordinary language models: BrierLM, FLOPs, and tokens a second (results/calm.json).

    python benchmarks/documents.py
    python benchmarks/calm.py --models tokens=runs/calm/tokens,k1=runs/calm/k1,k2=runs/calm/k2,k4=runs/calm/k4

The models are those of benchmarks/calm.toml. Each is asked at the same places of the same test documents, which none
was trained on. The first ordinary one is what the others are set beside. A name such as ``k4@25`` is a run of k4 that
was ended at a quarter of its training: it is measured too, and makes a line of the figure, but is not timed.

What was measured is noted model by model in the cache folder: a run that was broken off goes on where it was when it is
started again with the same settings. All timings are of one sitting.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from calm_figure import draw
from documents import MANIFEST, SAY, is_whole
from notes import Notes
from rich.console import Console

from quickmerge.bench.harness import environment
from quickmerge.calm.bench import calm_report, calm_rows, prompts_of
from quickmerge.calm.cli import open_models, parse_models
from quickmerge.calm.cli_train import AE_CHUNKS
from quickmerge.calm.cost import autoencoder_training_cost, measure_speed, speed_rows, temperature_rows, training_cost
from quickmerge.calm.evaluate import BrierText, brier_text, is_calm, text_terms
from quickmerge.console.options import one_sentence, progress, quiet, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.models import cache_folder

HERE = Path(__file__).parent
FIGURE = HERE.parent / "docs" / "images" / "calm.png"

Row = dict[str, Any]


def main() -> int:
    """Measure, write and draw; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", required=True, help="name=FOLDER of train calm, with commas")
    parser.add_argument("--documents", type=Path, help="folder that documents.py filled (default: in the cache folder)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window, as in training")
    parser.add_argument("--places", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--paths", type=int, default=4)
    parser.add_argument("--temperature", type=float, nargs="*", default=[1.0, 0.7, 0.5, 1 / 3])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--new", type=int, default=128, help="tokens that each model writes in the timing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of torch; default: as many as it takes")
    parser.add_argument("--notes", type=Path, help="default: calm.partial.jsonl in the cache folder")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "calm.json")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    args = parser.parse_args()
    quiet()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        with one_sentence():
            measure(args)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    """Ask every model at every place, let the whole ones write on, and put the results into one file."""
    folders = {name: Path(folder).expanduser() for name, folder in parse_models(args.models).items()}
    models, tokenizer = open_models({name: str(folder) for name, folder in folders.items()})
    spent = {
        name: tokens_seen(name, folders, args.length, model.config.patch if is_calm(model) else 0)
        for name, model in models.items()
    }
    against = next((name for name, model in models.items() if not is_calm(model)), None)
    if against is None:
        raise QuickmergeError("--models must name an ordinary language model to set the CALMs beside, got none")
    texts = unseen_documents(args.documents)
    patches = [model.config.patch for model in models.values() if is_calm(model)]
    text = brier_text(tokenizer, list(texts.values()), patches, length=args.length, limit=args.places)
    whole = {name: model for name, model in models.items() if "@" not in name}
    settings = {
        "weights": {name: _weights(folder) for name, folder in folders.items()},
        "text": hashlib.sha256(text.windows.numpy().tobytes() + text.places.numpy().tobytes()).hexdigest(),
        "samples": args.samples, "paths": args.paths, "temperature": args.temperature, "batches": args.batches,
        "new": args.new, "rounds": args.rounds, "threads": torch.get_num_threads(),
    }  # fmt: skip
    notes = Notes(args.notes or cache_folder() / "calm.partial.jsonl", settings)
    with progress() as bar:
        turns = args.rounds * len(args.batches) * len(whole)
        task = bar.add_task("measuring", total=len(models) * len(text.places) + turns)

        def advance(label: str, done: int) -> None:
            bar.update(task, advance=done, description=label)

        terms = _all_terms(notes, models, text, args, advance)
        draws = _all_draws(notes, whole, text, args, lambda label: bar.update(task, description=label))
        if "speed" not in notes.done and args.batches:
            found = measure_speed(
                whole, prompts_of(text, max(args.batches)), batches=args.batches, new=args.new, rounds=args.rounds,
                advance=lambda label: advance(label, 1),
            )  # fmt: skip
            notes.add("speed", found)
    rows = calm_rows(models, terms, text, against=against)
    for row in rows:
        row |= trained(models[row["method"]], spent[row["method"]], args.length)
    speeds = speed_rows(notes.done["speed"], against) if args.batches else []
    meta = {
        "documents": list(texts), "length": args.length, "places": len(text.places), "unit": text.unit,
        "samples": args.samples, "paths": args.paths, "new": args.new, "rounds": args.rounds, "against": against,
        "vocabulary": len(tokenizer),
    }  # fmt: skip
    write_json(args.out, {
        "rows": rows, "speeds": speeds, "temperatures": draws, "meta": meta, "environment": environment(),
    })  # fmt: skip
    draw(rows, args.figure)
    notes.remove()
    shown = [row for row in rows if row["method"] in whole]
    calm_report(shown, speeds, draws, meta).print(Console())


def _all_terms(
    notes: Notes,
    models: Mapping[str, Any],
    text: BrierText,
    args: argparse.Namespace,
    advance: Callable[[str, int], None],
) -> dict[str, torch.Tensor]:
    """The terms of every model, those that are noted already among them."""
    for name, model in models.items():
        key = f"terms {name}"
        if key in notes.done:
            advance(name, len(text.places))
            continue
        found = text_terms(model, text, samples=args.samples, paths=args.paths, advance=partial(advance, name))
        notes.add(key, [{"terms": found.tolist()}])
    return {name: torch.tensor(notes.done[f"terms {name}"][0]["terms"], dtype=torch.float64) for name in models}


def _all_draws(
    notes: Notes, models: Mapping[str, Any], text: BrierText, args: argparse.Namespace, say: Callable[[str], None]
) -> list[Row]:
    """What temperatures do to every CALM."""
    rows: list[Row] = []
    for name, model in models.items():
        if not is_calm(model) or not args.temperature:
            continue
        key = f"temperatures {name}"
        if key not in notes.done:
            say(f"{name} at temperatures")
            notes.add(key, [{"method": name, **row} for row in temperature_rows(model, text, args.temperature)])
        rows += notes.done[key]
    return rows


def trained(model: Any, seen: tuple[int, float, int, float], length: int) -> Row:
    """What was spent on a model: tokens seen, FLOPs with those of its autoencoder, and seconds."""
    tokens, seconds, frozen_tokens, frozen_seconds = seen
    cost = training_cost(model, length)
    own = tokens * cost.total
    frozen = frozen_tokens * autoencoder_training_cost(model.autoencoder) if is_calm(model) else 0.0
    return {
        "train_tokens": tokens, "train_flops": own + frozen, "train_flops_model": own,
        "train_flops_autoencoder": frozen, "train_flops_per_token": cost.total, "train_flops_parts": asdict(cost),
        "train_seconds": seconds + frozen_seconds,
    }  # fmt: skip


def tokens_seen(name: str, folders: Mapping[str, Path], length: int, patch: int) -> tuple[int, float, int, float]:
    """Tokens that a training saw and its seconds, by its metrics, and the same of its autoencoder's, if it has one.

    A run that was ended earlier (``k4@25``) has the autoencoder of the whole one.

    Raises:
        QuickmergeError: there are no metrics.
    """
    items, seconds = _seen(folders[name] / "metrics.jsonl")
    if not patch:
        return items * length, seconds, 0, 0.0
    inner = folders[name] / "autoencoder" / "metrics.jsonl"
    base = name.partition("@")[0]
    if not inner.is_file() and base in folders:
        inner = folders[base] / "autoencoder" / "metrics.jsonl"
    windows, first = _seen(inner)
    return items * length, seconds, windows * AE_CHUNKS * patch, first


def _seen(path: Path) -> tuple[int, float]:
    try:
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        return int(last["items"]), float(last["seconds"])
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise QuickmergeError(f"{path} must say how much a model was trained, and can't be read ({error})") from None


def unseen_documents(folder: Path | None) -> dict[str, str]:
    """The texts of the test documents in a folder that documents.py filled, by their names.

    Raises:
        QuickmergeError: the documents are not whole.
    """
    folder = folder or cache_folder() / "documents"
    if not is_whole(folder):
        raise QuickmergeError(f"the benchmark documents in {folder} are not whole: run benchmarks/documents.py first")
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["documents"]
    return {
        entry["file"]: (folder / entry["file"]).read_text(encoding="utf-8")
        for entry in entries
        if entry["split"] == "test"
    }


def _weights(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
