"""The prior over merged patches, measured on held-out images: writes benchmarks/results/patch_prior.json.

    python benchmarks/pictures.py && python benchmarks/patch_prior.py [--kind images|videos] [--draw]

Trains one small prior for each way of making fewer tokens, all of one shape and for the same steps on the same
images, and measures how well each slot is predicted from those before it, per original patch: the prediction is
copied to all members of the slot and compared with their pixels. Also draws docs/images/patch_prior.png. A run that is
cut short goes on where it was; priors are kept in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor

from quickmerge.bench.harness import environment
from quickmerge.datasets import ImageFolder, VideoClips, find_data
from quickmerge.files import write_json
from quickmerge.merge.prior import Prior, PriorConfig
from quickmerge.merge.prior.layout import predict, sample
from quickmerge.merge.prior.train_patches import KINDS, PriorPatches, images_of, train_prior_patches, view_of
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens import MergePlan, TokenView
from quickmerge.models import cache_folder
from quickmerge.training import TrainingConfig, train
from quickmerge.viz.drawing import LIGHT

HERE = Path(__file__).parent
SHAPE = {"width": 128, "layers": 3, "heads": 4, "directions": "forward"}
ROUNDS = 5
"""Timings of each way, in turn; the middle one counts."""
SHOWN = {"images": (40, 190, 330, 600), "videos": (3,)}
"""The held-out images of the drawing, by number."""
FAR = 3.0
"""Cells from its anchor beyond which a patch is called far."""
NOTHING_NEAR = 50.0
"""Logarithm of a weight of the mean beside which no slot is near enough to be copied."""
FRAMES = (0, 2, 4, 6)
"""The frames of the clip there."""


@dataclass(frozen=True)
class Blocks(Reducer):
    """Uniform pooling: the mean of every ``block`` of patches, (frames, rows, columns), whatever they show."""

    block: tuple[int, int, int] = (1, 1, 1)
    name: ClassVar[str] = "blocks"

    def plan(self, view: TokenView) -> MergePlan:
        """Each slot stands where the first patch of its block does."""
        assert view.grid is not None
        cell = torch.unravel_index(view.position, view.grid)
        first = [at - at % step for at, step in zip(cell, self.block, strict=True)]
        leader = (first[0] * view.grid[1] + first[1]) * view.grid[2] + first[2]
        return MergePlan.from_anchors(view, leader == view.position, leader)


@dataclass(frozen=True)
class Way:
    """A way of making fewer tokens of an image, and how much is kept by it."""

    name: str
    keep: float
    patch: tuple[int, int]
    reducer: Callable[[float], Reducer] = GridMerge
    blind: bool = False

    @property
    def folder(self) -> str:
        """What its prior's folder is called."""
        return f"{self.name.replace(' ', '-')}-{self.keep:g}"

    @property
    def merges(self) -> Reducer:
        """The reducer; larger patches are tokens of their own."""
        return self.reducer(1.0 if self.name == "larger patches" else self.keep)


@dataclass(frozen=True)
class Task:
    """One kind of image: what is read, and how long priors are trained."""

    kind: str
    size: int
    patch: int
    frames: int
    steps: int
    batch: int
    shrink: tuple[tuple[int, int, int], ...]

    def ways(self) -> list[Way]:
        """Unmerged patches, and three ways at each of three budgets."""
        one = (self.patch, self.patch)
        found = [Way("unmerged", 1.0, one)]
        for block in self.shrink:
            keep = 1 / math.prod(block)
            found.append(Way("GridMerge", keep, one))
            found.append(Way("uniform pooling", keep, one, partial(Blocks, block=block)))
            if block[0] == 1:  # a patch is of one frame
                found.append(Way("larger patches", keep, (block[1] * self.patch, block[2] * self.patch)))
        found.append(Way("GridMerge, layout alone", 0.25, one, blind=True))
        return found


TASKS = {
    "images": Task("images", 128, 8, 1, 800, 8, ((1, 1, 2), (1, 2, 2), (1, 2, 4))),
    "videos": Task("videos", 96, 16, 8, 150, 4, ((1, 1, 2), (1, 2, 2), (2, 2, 2))),
}


class Mirrored:
    """Images in memory, each also from right to left."""

    def __init__(self, source: ImageFolder | VideoClips) -> None:
        self.pixels = torch.stack([(source[i] * 255).round().byte() for i in range(len(source))])
        self._print = source.fingerprint()

    def __len__(self) -> int:
        return 2 * len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        picture = self.pixels[index // 2] / 255
        return picture.flip(-1) if index % 2 else picture

    def fingerprint(self) -> str:
        """That of the images, and that they are mirrored."""
        return f"mirrored {self._print}"


def pictures(task: Task, split: str) -> ImageFolder | VideoClips:
    """The images that benchmarks/pictures.py fetched."""
    folder = cache_folder() / ("images" if task.kind == "images" else "clips") / split
    if not folder.is_dir():
        raise SystemExit(f"{folder} is not there: run benchmarks/pictures.py")
    files = find_data([folder]).files
    return ImageFolder(files, task.size) if task.kind == "images" else VideoClips(files, task.size, task.frames)


def prior_folder(task: Task, way: Way, steps: int) -> Path:
    """Where the prior of a way is kept."""
    return cache_folder() / "patch-priors" / task.kind / f"{way.folder}-{steps}"


def trained(task: Task, way: Way, data: Mirrored, steps: int) -> Prior:
    """The prior for a way, trained if it is not yet."""
    out = prior_folder(task, way, steps)
    config = TrainingConfig(
        steps=steps, batch=task.batch, learning_rate=3e-3, warmup=min(30, steps), schedule="cosine", final=0.02,
        betas=(0.9, 0.95), save_every=max(1, steps // 4), log_every=20,
    )  # fmt: skip
    resume = any((out / "checkpoints").glob("step-*"))
    if way.blind:
        train_blind(task, way, data, config, out, resume)
    else:
        train_prior_patches(
            data, config, out, keeps=[way.merges.keep], patch=way.patch, kind=task.kind, reducer=way.reducer,
            resume=resume, **SHAPE,
        )  # fmt: skip
    return Prior.from_pretrained(out)


def train_blind(task: Task, way: Way, data: Mirrored, config: TrainingConfig, out: Path, resume: bool) -> None:
    """Train a prior that reads no contents, only where slots stand and how many patches they are of."""
    torch.manual_seed(config.seed)
    features = 3 * way.patch[0] * way.patch[1]
    prior = Prior(PriorConfig(features=features, axes=KINDS[task.kind], pool=0, saliency=False, **SHAPE))  # type: ignore[arg-type]
    torch.nn.init.zeros_(prior.encoder.anchor.weight).requires_grad_(False)
    if prior.nearness is not None:
        torch.nn.init.constant_(prior.nearness, NOTHING_NEAR).requires_grad_(False)
    goal = PriorPatches(prior, patch=way.patch, keeps=[way.keep], reducer=way.reducer)
    goal.calibrate(data)
    told = {"data": data.fingerprint(), "way": way.name}
    train(goal, data, config, out, resume=resume, fingerprint=told, finish=prior.save_pretrained)


@torch.no_grad()
def errors(way: Way, prior: Prior, held_out: Tensor, grey: Tensor) -> dict[str, Tensor]:
    """Mean squared error of every held-out image: of predictions, of true slots copied back, of one mean colour.

    In video also of what the prior copies from earlier slots, without its network.
    """
    found: dict[str, list[Tensor]] = {}
    for raw in held_out.split(8):
        x = raw / 255
        view = view_of(x, way.patch)
        plan = way.merges.plan(view)
        frames = x.shape[1] if x.ndim == 5 else None
        slots_by_name = {"mse": predict(prior, view, plan), "floor": plan.merge(view.hidden)}
        if prior.config.copies:
            slots_by_name["copy"] = predict(mute(prior), view, plan)
        for name, slots in slots_by_name.items():
            back = images_of(plan.unmerge(slots), way.patch, (x.shape[-2], x.shape[-1]), frames)
            found.setdefault(name, []).append((back - x).square().flatten(1).mean(1))
        found.setdefault("variance", []).append((x - grey).square().flatten(1).mean(1))
    return {name: torch.cat(parts).double() for name, parts in found.items()}


def mute(prior: Prior) -> Prior:
    """The prior with a head that says nothing, so that what is left of a prediction is what it copies."""
    copy = deepcopy(prior)
    for layer in (copy.head.to_mean, copy.head.to_raw):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    return copy


def measured(task: Task, way: Way, prior: Prior, held_out: Tensor, grey: Tensor) -> dict[str, Any]:
    """A row of results, without what it costs in time."""
    each = errors(way, prior, held_out, grey)
    count = len(held_out)
    variance = each["variance"].mean()

    def told(name: str) -> dict[str, float]:
        value = each[name].mean()
        # of a ratio of means, by its linear part
        spread = (each[name] - value / variance * each["variance"]).std() / variance
        return {
            name: float(value),
            f"{name}_stderr": float(each[name].std() / math.sqrt(count)),
            f"{name}_explained": float(1 - value / variance),
            f"{name}_explained_stderr": float(spread / math.sqrt(count)),
        }

    plan = way.merges.plan(view_of(held_out[:1] / 255, way.patch))
    n, k = plan.slot.shape[1], plan.slots
    return {
        "kind": task.kind, "way": way.name, "keep": way.keep, "patch": list(way.patch), "patches": n, "tokens": k,
        "variance": float(variance), **told("mse"), **told("floor"), **(told("copy") if "copy" in each else {}),
        "parameters": sum(p.numel() for p in prior.parameters()),
        "flops": flops(prior.config, n, k, way.name.startswith("GridMerge")),
    }  # fmt: skip


def flops(config: PriorConfig, patches: int, slots: int, planned: bool) -> float:
    """FLOPs of predicting all slots of an image: two for each weight, attention, copying, merging, planning."""
    d, w = config.features, config.width
    per_slot = 2 * (2 * d * w + (3 + 8 * config.axes) * w + w * w + 12 * config.layers * w * w)
    attention = 2 * config.layers * slots**2 * w
    merging = 2 * patches * d if slots < patches else 0
    planning = 3 * patches * slots * d if planned and slots < patches else 0
    copying = slots**2 * d if config.copies else 0
    return float(slots * per_slot + attention + merging + planning + copying)


@torch.no_grad()
def seconds(way: Way, prior: Prior, held_out: Tensor) -> float:
    """CPU seconds of one thread to cut, merge and predict an image, of eight at once."""
    x = held_out[:8] / 255
    began = time.process_time()
    view = view_of(x, way.patch)
    predict(prior, view, way.merges.plan(view))
    return (time.process_time() - began) / len(x)


def run(task: Task, steps: int) -> list[dict[str, Any]]:
    """Train and measure every way."""
    data = Mirrored(pictures(task, "train"))
    source = pictures(task, "test")
    # all clips, every fourth or so of the photographs
    chosen = range(0, len(source), max(1, len(source) // 160))
    held_out = torch.stack([(source[i] * 255).round().byte() for i in chosen])
    grey = (data.pixels.transpose(-3, 0).flatten(1).float().mean(1) / 255)[:, None, None]
    rows, priors = [], []
    for way in task.ways():
        prior = trained(task, way, data, steps)
        rows.append({**measured(task, way, prior, held_out, grey), "steps": steps})
        priors.append((way, prior))
        row = rows[-1]
        print(f"{task.kind} {way.folder}: {row['mse_explained']:.3f} of {row['floor_explained']:.3f}", flush=True)
    times = [[seconds(way, prior, held_out) for way, prior in priors] for _ in range(ROUNDS + 1)][1:]
    for row, mine in zip(rows, zip(*times, strict=True), strict=True):
        row["seconds"] = median(mine)
        row["seconds_ratio"] = median(mine) / median([round_[0] for round_ in times])
        row["flops_ratio"] = row["flops"] / rows[0]["flops"]
        row["images"] = len(held_out)
    return rows


@torch.no_grad()
def similarities(task: Task, count: int = 40) -> list[dict[str, float]]:
    """What `GridMerge` loses on training photographs, and how far its slots reach, by what similarity counts."""
    source = pictures(task, "train")
    x = torch.stack([source[i] for i in range(0, len(source), len(source) // count)])
    view = view_of(x, task.patch)
    assert view.grid is not None
    place = torch.stack(torch.unravel_index(view.position, view.grid), -1).float()
    variance = (view.hidden - view.hidden.mean((0, 1))).square().sum()
    rows = []
    for similarity in (0.0, 2.0, 8.0, 32.0, 128.0):
        for keep in (0.5, 0.25, 0.125):
            plan = GridMerge(keep=keep, similarity=similarity).plan(view)
            lost = (plan.unmerge(plan.merge(view.hidden)) - view.hidden).square().sum() / variance
            # anchors stand at the slots' positions
            anchor = torch.stack(torch.unravel_index(plan.unmerge(plan.position), view.grid), -1).float()
            reach = (anchor - place).square().sum(-1).sqrt()
            far = float((reach > FAR).sum() / (reach > 0).sum())
            rows.append({"similarity": similarity, "keep": keep, "lost": float(lost), "far": far, "images": len(x)})
    return rows


@torch.no_grad()
def stages(way: Way, prior: Prior, picture: Tensor, temperature: float) -> list[Tensor]:
    """An image ``(C, H, W)`` or clip ``(T, C, H, W)`` as it is, merged, predicted, and with its second half drawn."""
    frames = len(picture) if picture.ndim == 4 else None
    view = view_of(picture[None] / 255, way.patch)
    plan = way.merges.plan(view)
    # slots that stand in the upper half of an image, or in the first half of a clip
    start = int((plan.position[0] < view.hidden.shape[1] // 2).sum())
    drawn = sample(prior, view, plan, start, temperature, torch.Generator().manual_seed(0))
    found = [picture / 255]
    for slots in (plan.merge(view.hidden), predict(prior, view, plan), drawn):
        back = images_of(plan.unmerge(slots), way.patch, (picture.shape[-2], picture.shape[-1]), frames)
        found.append(back[0].clamp(0, 1))
    return found


def draw(path: Path, steps: dict[str, int], keep: float, temperature: float) -> None:
    """The strip of docs/: four photographs and a clip, one row for each stage."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("Agg")
    columns: list[list[Tensor]] = []
    for task in TASKS.values():
        way = next(w for w in task.ways() if w.name == "GridMerge" and w.keep == keep)
        prior = Prior.from_pretrained(prior_folder(task, way, steps[task.kind]))
        source = pictures(task, "test")
        for at in SHOWN[task.kind]:
            found = stages(way, prior, (source[at] * 255).round(), temperature)
            columns += [found] if task.kind == "images" else [[s[t] for s in found] for t in FRAMES]
    images = len(SHOWN["images"])
    labels = (
        "original",
        f"merged: {keep:.0%} of\nthe patches, each\nslot copied to its\nmembers",
        "predicted: each\nslot from the true\nslots before it",
        "drawn slot by slot\nfrom half-way on:\nlower half; frames\n5 to 8",
    )
    side, text, head, gap = 1.42, 1.45, 0.3, 0.14  # inches
    width, height = text + len(columns) * side + gap, head + 4 * side
    figure = plt.figure(figsize=(width, height), dpi=88, facecolor="white")
    for at, column in enumerate(columns):
        left = text + at * side + (gap if at >= images else 0)
        for row, picture in enumerate(column):
            bottom = height - head - (row + 1) * side
            axes = figure.add_axes((left / width, bottom / height, (side - 0.04) / width, (side - 0.04) / height))
            axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="lanczos")
            axes.set_axis_off()
            if row == 3 and at < images:
                axes.axhline(picture.shape[-2] / 2 - 0.5, color="white", linewidth=1.2, dashes=(3, 2))
            if at == 0:
                middle = (bottom + side / 2) / height
                figure.text(
                    0.08 / width, middle, labels[row], va="center", fontsize=9.5, color=LIGHT.ink, linespacing=1.35
                )
        if at >= images:
            middle = (left + side / 2) / width
            told = f"frame {FRAMES[at - images] + 1}"
            figure.text(middle, 1 - 0.19 / height, told, ha="center", va="center", fontsize=9, color=LIGHT.muted)
    middle = (text + images * side / 2) / width
    told = "photographs the prior has not seen"
    figure.text(middle, 1 - 0.19 / height, told, ha="center", va="center", fontsize=9, color=LIGHT.muted)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> int:
    """Train, measure, write and draw."""
    parser = argparse.ArgumentParser(description="Measure the prior over merged patches.")
    parser.add_argument("--kind", choices=list(TASKS), help="only these images; the other rows stay as they are")
    parser.add_argument("--steps", type=int, help="training steps of each prior (default: 800 images, 150 videos)")
    parser.add_argument("--draw", action="store_true", help="only draw, from priors that are trained")
    parser.add_argument("--keep", type=float, default=0.5, help="of the drawing")
    parser.add_argument("--temperature", type=float, default=0.3, help="of the drawing")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "patch_prior.json")
    parser.add_argument("--figure", type=Path, default=HERE.parent / "docs" / "images" / "patch_prior.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    steps = {kind: args.steps or task.steps for kind, task in TASKS.items()}
    if not args.draw:
        kinds = [args.kind] if args.kind else list(TASKS)
        # what --kind leaves out stays as it was
        old = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.kind and args.out.is_file() else []
        rows = [row for row in old if row["kind"] not in kinds]
        for kind in kinds:
            rows += run(TASKS[kind], steps[kind])
        tasks = {kind: asdict(task) for kind, task in TASKS.items()}
        found = {"rows": rows, "similarity": similarities(TASKS["images"])}
        write_json(args.out, {"environment": environment(), "shape": SHAPE, "tasks": tasks, **found})
    draw(args.figure, steps, args.keep, args.temperature)
    return 0


if __name__ == "__main__":
    sys.exit(main())
