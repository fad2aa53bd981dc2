"""How much of a video's features is left when its patches are merged across time (results/vision_video.json).

python benchmarks/pictures.py && python benchmarks/vision_video.py

Every frame goes through the embedded vision transformer alone, then patches of all frames are merged. Fidelity is the
mean cosine of each original patch's features with those of the token that it became.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import tables
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor

import quickmerge as qm
from quickmerge.bench.harness import environment
from quickmerge.bench.stats import mean_interval
from quickmerge.console.options import quiet, write_json
from quickmerge.datasets import VideoClips
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.merge.reducers.pooling import GridMerge
from quickmerge.merge.tokens import Evidence
from quickmerge.merge.tokens.saliency import AttentionTrace
from quickmerge.merge.vision.vit import encode_frames
from quickmerge.models import cache_folder
from quickmerge.models.load_vision import load_vision
from quickmerge.sampling import evenly

HERE = Path(__file__).parent


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.125])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--stride", type=int, default=2)
    parser.add_argument("--clips", type=int, default=8, help="clips of each video at most, evenly taken")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vision_video.json")
    args = parser.parse_args()
    quiet()
    model, processor = load_vision("vit-small-14")
    form = PixelFormat.of(processor)
    found: dict[tuple[str, float], list[float]] = {}
    videos = sorted((cache_folder() / "clips" / "test").glob("*.*"))
    for path in videos:
        clips = VideoClips([path], (form.height, form.width), args.frames, args.stride)
        for index in track(evenly(range(len(clips)), args.clips), path.stem):
            pixels = form.standardised(clips[index])[None]
            with torch.inference_mode():
                full = encode_frames(model, pixels, GridMerge(keep=1.0)).hidden
            for keep in args.keep:
                for name, features in ways(full, keep, args.frames).items():
                    found.setdefault((name, keep), []).append(float(F.cosine_similarity(features, full, dim=-1).mean()))
    rows = []
    for (name, keep), values in found.items():
        middle, low, high = mean_interval(values)
        rows.append({"method": name, "keep": keep, "fidelity": middle, "low": low, "high": high, "clips": len(values)})
    meta = {"model": "vit-small-14", "frames": args.frames, "stride": args.stride, "videos": [p.name for p in videos]}
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    tables.vision_video(rows).print(Console())
    return 0


def ways(full: Tensor, keep: float, frames: int) -> dict[str, Tensor]:
    """The features that each patch is left with, ``(1, T H W, D)``, by method, from those of single frames."""
    side = int((full.shape[1] // frames) ** 0.5)
    grid = (frames, side, side)
    index = torch.arange(full.shape[1])[None]
    key = full[:, None]
    view = qm.TokenView(
        full, position=index, grid=grid, evidence=Evidence(attention=(AttentionTrace(key, key, key, 1.0),))
    )
    out: dict[str, Tensor] = {}
    methods = {
        "grid (space and time)": GridMerge(keep=keep),
        "grid, by place alone": GridMerge(keep=keep, coverage=1.0, similarity=0.0),
        "tome": qm.ToMe(keep=keep),
        "quickmerge": qm.QuickMergeVision(keep=keep),
        # At a fixed share, so that all rows of one keep have as many tokens.
        "quickmerge as published": replace(qm.QuickMergeVision.paper(), keep=keep),
        "random, dropped": qm.Random(keep=keep),
    }
    for name, method in methods.items():
        plan = method.plan(view)
        out[name] = plan.unmerge(method.combine(view, plan, full))
    # What everybody does without a library: fewer frames, each standing for those around it.
    left = max(1, round(frames * keep))
    nearest = [(min(left - 1, t * left // frames) * 2 + 1) * frames // (2 * left) for t in range(frames)]
    out["fewer frames"] = full.view(1, frames, -1, full.shape[-1])[:, nearest].flatten(1, 2)
    return out


if __name__ == "__main__":
    sys.exit(main())
