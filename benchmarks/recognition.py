"""Recognition as next-token prediction: decoding, depth, masks, objectives (results/recognition.json).

python benchmarks/scenes.py && python benchmarks/recognition.py [--steps N] [--seeds 0 1 2] [--work runs/recognition]

Small recognisers (the embedded ViT-S/14, frozen, in front of SmolLM2's first blocks) are trained by the shared loop on
the features of rendered scenes, read once, and measured on test scenes. All of them see the same images for the same
number of steps, so numbers compare variants and are not the best that any of them can do. Image tokens are averaged in
squares of 4 x 4, 16 to an image. All projectors are aligned by the boxes of the training scenes first.

A killed call goes on with the run that it was at; delete a run's folder below --work to train it again.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from recognition_runs import (
    Variant,
    finish,
    finished,
    measure_times,
    measure_ways,
    pooled,
    train_run,
)
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.annotated import read_annotated
from quickmerge.models import cache_folder, load_vision
from quickmerge.recognition import Recognizer
from quickmerge.recognition.sentence import SentenceEncoder
from quickmerge.recognition.train import LabelledScenes, pixel_format, read_features
from quickmerge.training import TrainingConfig

HERE = Path(__file__).parent
DEPTHS = (1, 3, 6)
LAYERS = (4, 8, 11)
"""Hidden states of the encoder: its first layers know colours and edges, its last one little but what is salient."""


def variants(blocks: int) -> list[Variant]:
    """All that is compared; ``blocks`` where depth is not what differs."""
    named = Variant("paper", blocks, timed=True)
    depths = [Variant(f"{depth} block{'s' * (depth > 1)}", depth) for depth in DEPTHS if depth != blocks]
    # Only these learn what follows a separator, and so can be decoded as one sequence.
    ways = ("one-shot", "greedy", "beam")
    masks = [
        Variant(f"reference, {mask} mask", blocks, mask, "reference", ways=ways, timed=mask == "causal")
        for mask in ("independent", "prefix", "causal")
    ]
    return [named, *depths, *masks]


def main() -> int:
    """Train what is not trained yet, measure it, and write everything that was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=Path, help="default: the scenes in the cache folder")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--align", type=int, default=1000, help="training scenes that the projector is aligned by")
    parser.add_argument("--precision", default="bf16", help="of the training and of the encoder: bf16 or no")
    parser.add_argument("--blocks", type=int, default=3, choices=DEPTHS, help="where depth is not what differs")
    parser.add_argument("--train", type=int, default=1300, help="training scenes")
    parser.add_argument("--test", type=int, default=100, help="test scenes")
    parser.add_argument("--timed", type=int, default=12, help="test scenes that are decoded one by one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="names of variants")
    parser.add_argument("--work", type=Path, default=Path("runs/recognition"))
    parser.add_argument("--out", type=Path, default=HERE / "results" / "recognition.json")
    args = parser.parse_args()
    wanted = [variant for variant in variants(args.blocks) if not args.only or variant.name in args.only]
    quiet()
    torch.set_num_threads(1)
    say = partial(Console(stderr=True, soft_wrap=True).print, highlight=False)
    scenes = args.scenes or cache_folder() / "scenes"
    encoder = load_vision("vit-small-14")[0]
    language, tokenizer = qm.load("smollm2-135m")

    def fresh(variant: Variant) -> Recognizer:
        return Recognizer.new(
            encoder, language, tokenizer, blocks=variant.blocks, mask=variant.mask, layers=LAYERS
        )  # fmt: skip

    seer = fresh(Variant("seer", 1))  # for its encoder, which all of them share
    form = pixel_format(seer)
    train = LabelledScenes(read_annotated(scenes / "train")[: args.train], form)
    test = LabelledScenes(read_annotated(scenes / "test")[: args.test], form)
    half = args.precision == "bf16"

    @cache
    def features(which: str, pool: int) -> Tensor:
        """The features of all images of a part, from the work folder if they were read before."""
        data = train if which == "train" else test
        path = args.work / f"features-{which}-{len(data)}-pool{pool}-{args.precision}.safetensors"
        if not path.is_file():
            with progress() as bar:
                task = bar.add_task(f"reading the {which} scenes", total=len(data))
                read = read_features(
                    seer, data, half=half, shrink=partial(pooled, by=pool),
                    advance=lambda count: bar.update(task, advance=count),
                )  # fmt: skip
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"features": read}, path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        return load_file(path)["features"]

    encode = SentenceEncoder.load()
    runs: list[dict[str, Any]] = []
    for seed in args.seeds:
        for variant in wanted:
            settings = {
                "steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate,
                "precision": args.precision, "align": args.align, "blocks": variant.blocks, "train": len(train),
                "test": len(test),
            }  # fmt: skip
            out = variant.folder(args.work, seed)
            done = finished(out, settings)
            if done is None:
                say(f"{variant.name}, seed {seed}")
                config = TrainingConfig(
                    steps=args.steps, batch=args.batch, learning_rate=args.learning_rate,
                    warmup=min(20, args.steps // 4), final=0.05, betas=(0.9, 0.98), precision=args.precision, seed=seed,
                    save_every=args.steps,
                )  # fmt: skip
                train.keep(features("train", variant.pool))
                recognizer, seconds = train_run(fresh, variant, seed, train, config, out, args.align)
                known = features("test", variant.pool)
                done = {"settings": settings, "variant": variant.name, "seed": seed, "blocks": variant.blocks,
                        "mask": variant.mask, "objective": variant.objective, "tokens": known.shape[1],
                        "train_seconds": seconds,
                        "ways": measure_ways(recognizer, known, test.labels, variant.ways, encode)}  # fmt: skip
                if variant.timed:
                    done["times"] = measure_times(recognizer, known, args.timed)
                finish(out, done)
            runs.append(done)
            exact = done["ways"]["one-shot"]["exact_at_own"]["recall"]
            say(f"{variant.name}, seed {seed}: recall {exact:.3f}, trained in {done['train_seconds']:.0f} s")
    meta = {
        "models": "vit-small-14 (frozen), smollm2-135m cut", "data": "scenes of benchmarks/scenes.py",
        "steps": args.steps, "batch": args.batch, "learning_rate": args.learning_rate, "precision": args.precision,
        "align": args.align, "blocks": args.blocks, "train": len(train), "test": len(test), "timed": args.timed,
        "seeds": args.seeds,
    }  # fmt: skip
    write_json(args.out, {"runs": runs, "meta": meta, "environment": environment()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
