"""Where in a vision-language model visual tokens are reduced, and which positions they keep (results/vlm_places.json).

python benchmarks/vlm_places.py --model runs/vlm [--images 24]

SCOPE at one share: behind the projector with positions kept or consecutive, in front of blocks of the language model,
and both. The same questions about test scenes everywhere.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

import tables
import torch
from rich.console import Console

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.annotated import read_annotated
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.vlm import answer_records, answer_rows
from quickmerge.models import cache_folder
from quickmerge.sampling import evenly

HERE = Path(__file__).parent


def arms(model: Any, keep: float) -> list[Arm]:
    """Each place, for prompts that are read one by one: inside the language model the question matters too."""
    third = len(model.model.language_model.layers) // 3
    places: dict[str, dict[str, Any]] = {
        "behind the projector": {"layer": 0},
        "behind the projector, positions consecutive": {"layer": 0, "positions": "consecutive"},
        f"in front of block {third}": {"layer": third},
        f"in front of block {2 * third}": {"layer": 2 * third},
        f"behind the projector and in front of block {third}": {"layer": [0, third]},
    }
    settings = {"keep": keep, "shared": False}
    return [Arm(name, partial(_attach, model, keep, place), settings) for name, place in places.items()]


def _attach(model: Any, keep: float, place: dict[str, Any]) -> Any:
    # two merges leave the same share as one
    share = keep**0.5 if isinstance(place["layer"], list) else keep
    return qm.reduce(model, qm.SCOPE(keep=share), **place)


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that `quickmerge train vlm` wrote, or another LLaVA")
    parser.add_argument("--scenes", type=Path, default=cache_folder() / "scenes" / "test")
    parser.add_argument("--images", type=int, default=24, help="at most, evenly taken")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vlm_places.json")
    args = parser.parse_args()
    quiet()
    try:
        pictures = evenly([one for one in read_annotated(args.scenes) if one.questions], args.images)
        model, processor = qm.load_vlm(args.model, dtype=getattr(torch, args.dtype))
    except QuickmergeError as error:
        Console(stderr=True).print(str(error), markup=False)
        return 2
    ways, records = arms(model, args.keep), []
    with progress() as bar:
        task = bar.add_task("asking", total=len(pictures) * (1 + len(ways)))
        for number, picture in enumerate(pictures):
            found = answer_records(model, processor, picture, ways, lambda _: bar.update(task, advance=1))
            records += [{"image": number, **record} for record in found]
    rows = answer_rows(records)
    meta = {"model": Path(args.model).name, "keep": args.keep, "dtype": args.dtype, "scenes": len(pictures)}
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    tables.vlm_places(rows).print(Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
