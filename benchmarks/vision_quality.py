"""What fewer tokens cost a vision transformer in labels and features (results/vision_quality.json).

python benchmarks/labelled_images.py && quickmerge train classifier ... && quickmerge train dynamicvit ...
python benchmarks/vision_quality.py --classifier runs/groceries --dynamicvit runs/groceries-dynamicvit
python benchmarks/vision_quality.py --data fashion-mnist --out benchmarks/results/vision_fashion.json

With --classifier the labels are those of its head; without, of a linear probe on the embedded model's features, fitted
on the training images as the model reads them in full.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.console.options import progress, quiet, write_json
from quickmerge.datasets.labelled import load_batch, read_labelled
from quickmerge.merge.bench.vision import arms, bench_images, look, vision_report
from quickmerge.merge.bench.vision_cost import choose_probe
from quickmerge.merge.reducers import make_reducer
from quickmerge.models import cache_folder
from quickmerge.models.load_vision import load_vision
from quickmerge.sampling import evenly

HERE = Path(__file__).parent
BATCH = 16


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="groceries", help="groceries or fashion-mnist, or a folder of that form")
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--dynamicvit", type=Path, nargs="*", default=[])
    parser.add_argument("--reducer", default="quickmerge,tome,tofu,attention,random,pool")
    parser.add_argument("--ratio", type=float, nargs="+", default=[0.35, 0.5, 0.65])
    parser.add_argument("--limit", type=int, default=1000, help="test images at most, evenly taken")
    parser.add_argument("--train", type=int, default=1000, help="training images of a probe at most, evenly taken")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vision_quality.json")
    args = parser.parse_args()
    quiet()
    folder = Path(args.data) if Path(args.data).is_dir() else cache_folder() / "labelled" / args.data
    test = evenly(read_labelled(folder / "test"), args.limit)
    probe, classes = None, None
    if args.classifier is not None:
        model, processor = load_vision(args.classifier, task="classify")
        classes = [model.config.id2label[i] for i in range(model.config.num_labels)]
    else:
        model, processor = load_vision("vit-small-14")
        train = evenly(read_labelled(folder / "train"), args.train)
        val = train[::5]
        kept = [image for i, image in enumerate(train) if i % 5]
        sets = []
        for part in (kept, val):
            pooled = [
                look(model, load_batch([image.path for image in part[i : i + BATCH]], processor)).pooled
                for i in track(range(0, len(part), BATCH), "features")
            ]
            sets.append((torch.cat(pooled), [image.label for image in part]))
        probe = choose_probe(*sets)
    batches = [load_batch([image.path for image in test[i : i + BATCH]], processor) for i in range(0, len(test), BATCH)]
    methods = [make_reducer(name, place="vision") for name in args.reducer.split(",")]
    trained = [
        (qm.DynamicViT.from_pretrained(path), load_vision(path / "backbone", task="classify")[0])
        for path in args.dynamicvit
    ]
    everything = arms(model, methods, args.ratio, batches[0], trained=trained)
    with progress() as bar:
        task = bar.add_task("measuring", total=(1 + len(everything)) * len(batches))
        rows = bench_images(
            model, batches, everything, labels=[image.label for image in test], classes=classes, probe=probe,
            advance=lambda label: bar.update(task, advance=1, description=label),
        ).rows  # fmt: skip
    meta = {
        "data": args.data, "images": len(test), "labels": "head" if probe is None else f"probe, l2 {probe.l2:g}",
        "model": "vit-small-14" if args.classifier is None else "vit-small-14, fine-tuned",
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    vision_report(rows, meta).print(Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
