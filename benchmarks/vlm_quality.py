"""Right answers and time of a vision-language model with fewer visual tokens (results/vlm_quality.json).

python benchmarks/scenes.py && python benchmarks/labelled_images.py && python benchmarks/mosaics.py
python benchmarks/vlm_quality.py --model runs/vlm

What was answered is noted image by image beside --out, so that a run that was broken off goes on where it was when
it is started again with the same settings.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from notes import Notes
from pictures import SAY
from rich.console import Console

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.annotated import Annotated, read_annotated
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.answers import answer_arms
from quickmerge.merge.bench.vlm import answer_records, answer_rows, answers_report, time_answers
from quickmerge.merge.reducers import VISUAL_TOKEN_REDUCERS, make_reducer
from quickmerge.models import cache_folder
from quickmerge.models.identity import model_hash
from quickmerge.sampling import evenly

HERE = Path(__file__).parent
DTYPES = ("float32", "bfloat16")


def main() -> int:
    """Measure and write; 2 where something that is needed is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder that `quickmerge train vlm` wrote, or another VLM")
    parser.add_argument("--scenes", type=Path, default=cache_folder() / "scenes" / "test")
    parser.add_argument("--mosaics", type=Path, default=cache_folder() / "mosaics" / "test")
    parser.add_argument("--images", type=int, default=100, help="of each of the two at most, evenly taken")
    parser.add_argument("--reducer", default=",".join(VISUAL_TOKEN_REDUCERS))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.11])
    parser.add_argument("--rounds", type=int, default=11, help="how often each method is timed")
    parser.add_argument("--processes", type=int, default=1, help="that answer side by side, each on one thread")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vlm_quality.json")
    args = parser.parse_args()
    if min(args.images, args.rounds, args.processes) < 1:
        given = f"{args.images}, {args.rounds} and {args.processes}"
        parser.error(f"--images, --rounds and --processes must be at least 1, got {given}")
    quiet()
    try:
        measure(args)
    except QuickmergeError as error:
        SAY.print(str(error), markup=False)
        return 2
    return 0


def measure(args: argparse.Namespace) -> None:
    """Answer every question of both sets by every method, and time each on scenes."""
    sets = {
        name: evenly([picture for picture in read_annotated(folder) if picture.questions], args.images)
        for name, folder in (("scenes", args.scenes), ("mosaics", args.mosaics))
    }
    methods = [make_reducer(name, place="visual") for name in args.reducer.split(",")]
    model, processor = qm.load_vlm(args.model, dtype=getattr(torch, args.dtype))
    arms = answer_arms(model, processor, methods, args.keep)
    settings = {
        "model": model_hash(model), "dtype": args.dtype, "arms": [arm.label for arm in arms],
        "images": {name: told(pictures) for name, pictures in sets.items()},
    }  # fmt: skip
    notes = Notes(args.out.with_suffix(".partial.jsonl"), settings)
    done = notes.done
    with progress() as bar:
        work = (1 + len(arms)) * (sum(map(len, sets.values())) + args.rounds + 1)
        task = bar.add_task("measuring", total=work)

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=label)

        keyed = {f"{name} {index}": one for name, pictures in sets.items() for index, one in enumerate(pictures)}
        bar.update(task, advance=(1 + len(arms)) * len(done.keys() & keyed))
        left = {key: picture for key, picture in keyed.items() if key not in done}

        if args.processes == 1:
            for key, picture in left.items():
                notes.add(key, answer_records(model, processor, picture, arms, advance))
        else:
            start = (args.model, args.dtype, args.reducer, args.keep)
            spawn = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(args.processes, mp_context=spawn, initializer=begin, initargs=start) as pool:
                asked = {pool.submit(answer, picture): key for key, picture in left.items()}
                for future in as_completed(asked):
                    notes.add(asked[future], future.result())
                    bar.update(task, advance=1 + len(arms), description=asked[future])
        records = [
            {**record, "data": name, "image": index}
            for name, pictures in sets.items()
            for index in range(len(pictures))
            for record in done[f"{name} {index}"]
        ]
        times = time_answers(model, processor, sets["scenes"], arms, args.rounds, advance)
    rows = []
    for name in sets:
        found = answer_rows([record for record in records if record["data"] == name])
        rows += [{"data": name, **row, **spent} for row, spent in zip(found, times, strict=True)]
    meta = {
        "model": Path(args.model).name, "dtype": args.dtype, "rounds": args.rounds,
        **{name: len(pictures) for name, pictures in sets.items()},
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    notes.remove()
    for name in sets:
        Console().print(name)
        mine = [row for row in rows if row["data"] == name]
        answers_report(mine, {**meta, "images": meta[name]}).print(Console())


HELD: dict[str, Any] = {}
"""What a process that answers holds: the model, its processor and the arms."""


def begin(model: str, dtype: str, reducers: str, keeps: list[float]) -> None:
    """Make a process ready to answer."""
    quiet()
    torch.set_num_threads(1)
    network, processor = qm.load_vlm(model, dtype=getattr(torch, dtype), progress=False)
    methods = [make_reducer(name, place="visual") for name in reducers.split(",")]
    HELD.update(model=network, processor=processor, arms=answer_arms(network, processor, methods, keeps))


def answer(picture: Annotated) -> list[dict[str, Any]]:
    """All that is asked about an image, in a process that `begin` has made ready."""
    return answer_records(HELD["model"], HELD["processor"], picture, HELD["arms"])


def told(pictures: list[Annotated]) -> str:
    """A sha256 over what is asked, for telling whether notes belong to the same run."""
    texts = [f"{picture.path.name} {picture.questions}" for picture in pictures]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
