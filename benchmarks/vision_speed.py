"""How fast vision transformers get, beside what their FLOPs allow (results/vision_speed.json).

python benchmarks/vision_speed.py [--batch 8] [--rounds 21] [--device cuda --dtype bfloat16]

A ViT-S/16 at 224 pixels with random weights (speed does not depend on them) and fused attention. All ways take turns in
one run; a method's own work is inside.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tables
import torch
import transformers
from rich.console import Console
from torch import nn

import quickmerge as qm
from quickmerge.bench.harness import Arm, environment
from quickmerge.console.options import progress, write_json
from quickmerge.merge.bench.vision import look, time_arms
from quickmerge.merge.bench.vision_cost import vision_shape
from quickmerge.merge.reducers.dynamicvit import Predictor
from quickmerge.models.encoder import find_encoder

HERE = Path(__file__).parent
AIMS = {"tome, r = 8": 1.28, "tome, r = 13": 1.62, "tome, r = 16": 1.90, "dynamicvit, keep 0.7": 1.50}
"""What the project asks of itself at batch 8 on a CPU."""


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "vision_speed.json")
    args = parser.parse_args()
    config = transformers.ViTConfig(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        intermediate_size=1536,
        image_size=224,
        patch_size=16,
    )
    torch.manual_seed(0)
    model = transformers.ViTModel._from_config(config, attn_implementation="sdpa").eval()
    model = model.to(args.device, getattr(torch, args.dtype))
    ways = ways_of(model, config)
    shape, rows = vision_shape(find_encoder(model)), []
    for batch in args.batch:
        x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        x = x.to(args.device, getattr(torch, args.dtype))
        limits = [1.0]
        for way in ways:
            seen = look(model, x[:1], way)
            limits.append(1 / shape.ratio(197, seen.entering, seen.leaving))
        with progress() as bar:
            task = bar.add_task(f"batch {batch}", total=(1 + len(ways)) * (args.rounds + 1))
            times = time_arms(model, x, ways, args.rounds, lambda _, task=task: bar.update(task, advance=1))
        for row, limit in zip(times, limits, strict=True):
            rows.append({**row, "limit": limit, "aim": AIMS.get(row["method"])})
    meta = {"model": "ViT-S/16, 224 pixels, random weights", "dtype": args.dtype, "device": args.device}
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    tables.vision_speed(rows).print(Console())
    return 0


def ways_of(model: Any, config: Any) -> list[Arm]:
    """What is measured."""

    def way(name: str, reducer: qm.Reducer, layer: Any) -> Arm:
        attach: Callable[[], Any] = lambda: qm.reduce(model, reducer, layer)  # noqa: E731
        return Arm(name, attach, {"keep": 1.0})

    torch.manual_seed(1)
    predictors = nn.ModuleList(Predictor(config.hidden_size) for _ in range(3)).to(model.device, model.dtype).eval()
    trained = qm.DynamicViT(keep=0.7, predictors=predictors)
    return [
        *(way(f"tome, r = {r}", qm.ToMe(), qm.Removal(r)) for r in (8, 13, 16)),
        way("tofu, r = 13", qm.ToFu(), qm.Removal(13)),
        way("quickmerge, r = 13", qm.QuickMergeVision(), qm.Removal(13)),
        way("dynamicvit, keep 0.7", trained, None),
    ]


if __name__ == "__main__":
    sys.exit(main())
