"""What a trained recogniser says of images, with all image tokens and with fewer (results/recognizer_tokens.json).

python benchmarks/recognizer_tokens.py --model runs/recognizer [--images 100]

`benchmarks/recognizer.toml` says how the recogniser is trained. Scenes and mosaics of photographs are told apart, and
with all tokens the labels that it finds are counted by what they name.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import tables
import torch
from recognition_runs import BATCH, TOP, WAYS, measure_reduced
from rich.console import Console
from scene_things import SHAPES
from torch import Tensor

from quickmerge.bench.harness import environment
from quickmerge.console.options import quiet, write_json
from quickmerge.datasets.annotated import read_annotated
from quickmerge.errors import QuickmergeError
from quickmerge.merge.reducers import make_reducer
from quickmerge.models import cache_folder
from quickmerge.recognition import Recognizer
from quickmerge.recognition.sentence import SentenceEncoder
from quickmerge.recognition.train import LabelledScenes, pixel_format
from quickmerge.sampling import evenly

HERE = Path(__file__).parent
ARMS = [("full", 1.0), *((name, keep) for keep in (0.5, 0.25) for name in ("tome", "scope", "random"))]


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder that `quickmerge train recognizer` wrote")
    parser.add_argument("--scenes", type=Path, default=cache_folder() / "scenes" / "test")
    parser.add_argument("--mosaics", type=Path, default=cache_folder() / "mosaics" / "test")
    parser.add_argument("--images", type=int, default=100, help="of each of the two at most, evenly taken")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recognizer_tokens.json")
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    try:
        recognizer, encode = Recognizer.from_pretrained(args.model), SentenceEncoder.load()
        sets = {
            name: LabelledScenes(evenly(read_annotated(folder), args.images), pixel_format(recognizer))
            for name, folder in (("scenes", args.scenes), ("mosaics", args.mosaics))
        }
    except QuickmergeError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    kinds = [{"data": name, **row} for name, data in sets.items() for row in by_kind(recognizer, data)]
    rows = [{"data": name, **row} for name, data in sets.items() for row in measured(recognizer, data, encode)]
    meta = {
        "model": args.model.name, "blocks": len(recognizer.language.base_model.layers),
        **{name: len(data) for name, data in sets.items()},
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "kinds": kinds, "meta": meta, "environment": environment()})
    tables.recognition_tokens(rows).print(Console())
    return 0


def by_kind(recognizer: Recognizer, data: LabelledScenes) -> list[dict[str, Any]]:
    """How many labels of each kind are among the ten best, with all image tokens, for two ways to decode."""
    rows = []
    for way in ("one-shot", "best-first"):
        there, found = Counter[str](), Counter[str]()
        for start in range(0, len(data), BATCH):
            batch = range(start, min(start + BATCH, len(data)))
            with torch.inference_mode():
                features, valid = recognizer.look(torch.stack([data.pixels(index) for index in batch]))
                guesses = WAYS[way](recognizer, recognizer.prefix(features, valid))
            for index, row in zip(batch, guesses, strict=True):
                given = {guess.label for guess in row[:TOP]}
                there.update(kind(label) for label in data.labels[index])
                found.update(kind(label) for label in data.labels[index] if label in given)
        rows += [{"way": way, "kind": name, "labels": count, "found": found[name]} for name, count in there.items()]
    return sorted(rows, key=lambda row: (row["way"], row["kind"]))


def kind(label: str) -> str:
    """What a label names: a word or a digit, which say so themselves, a coloured shape, or a photographed fruit."""
    first = label.split()[0]
    return first if first in ("word", "digit") else "shape" if label.split()[-1] in SHAPES else "photograph"


def measured(recognizer: Recognizer, data: LabelledScenes, encode: Any) -> list[dict[str, Any]]:
    """Scores of each way to have fewer image tokens."""

    @cache
    def look(reducer: str, keep: float) -> list[tuple[Tensor, Tensor | None]]:
        less = None if reducer == "full" else make_reducer(reducer, place="vision", keep=keep)
        torch.manual_seed(0)  # of the reducer that draws
        seen = []
        for start in range(0, len(data), BATCH):
            rows = range(start, min(start + BATCH, len(data)))
            with torch.inference_mode():
                tokens, valid = recognizer.look(torch.stack([data.pixels(index) for index in rows]), less)
            seen.append((tokens.bfloat16(), valid))
        return seen

    with torch.inference_mode():
        return measure_reduced(recognizer, look, data.labels, ARMS, encode)


if __name__ == "__main__":
    sys.exit(main())
