"""What choosing visual tokens costs and how good greedy choices are (results/selection.json).

python benchmarks/selection.py [--rounds 15]

Features and class-token attention of a real vision transformer on photographs. Each method is timed against the same
choice as one would write it from the paper, vectorised; both take turns in one run. Beside it, greedy choices against
the best of all subsets on small draws of the same tokens.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import tables
import torch
from rich.console import Console
from torch import Tensor
from torch.nn.functional import normalize

import quickmerge as qm
from quickmerge.bench.harness import environment, interleave, seconds_of
from quickmerge.console.options import progress, write_json
from quickmerge.datasets.labelled import load_batch
from quickmerge.merge.reducers.trimtokenator import alignment
from quickmerge.merge.tokens.selection import cover, disperse
from quickmerge.models import cache_folder

HERE = Path(__file__).parent
SIDES = (336, 518)
"""Pixels: 576 and 1,369 tokens."""
SMALL, PICK, DRAWS = 14, 5, 40


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--images", type=Path, default=cache_folder() / "images" / "test")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "selection.json")
    args = parser.parse_args()
    model, processor = qm.load_vision("vit-small-14")
    paths = sorted(p for p in args.images.rglob("*") if p.suffix in (".jpg", ".png", ".jpeg"))[: args.rounds]
    if not paths:
        Console(stderr=True).print(f"no images in {args.images}; benchmarks/pictures.py fetches some")
        return 2
    rows: list[dict[str, Any]] = []
    with progress() as bar:
        task = bar.add_task("choosing", total=len(SIDES) * len(paths))
        for side in SIDES:
            times: dict[tuple[str, int], list[tuple[float, float]]] = {}
            for path in paths:
                x, saliency, text = look(model, processor, path, side)
                for name, count, ours, plain in ways(x, saliency, text):
                    times.setdefault((name, count), []).append(both(ours, plain))
                bar.update(task, advance=1)
            for (name, count), pairs in times.items():
                speedups = sorted(b / a for a, b in pairs)
                rows.append({
                    "method": name, "tokens": (side // 14) ** 2, "keep": count, "rounds": len(pairs),
                    "seconds": statistics.median(a for a, _ in pairs),
                    "plain_seconds": statistics.median(b for _, b in pairs),
                    "speedup": statistics.median(speedups),
                    "speedup_low": speedups[len(speedups) // 4], "speedup_high": speedups[-1 - len(speedups) // 4],
                })  # fmt: skip
    best = [against_all_subsets(name, model, processor, paths) for name in ("coverage", "dispersion")]
    meta = {"model": "vit-small-14", "images": len(paths), "text_tokens": 40, "dtype": "float32"}
    write_json(args.out, {"rows": rows, "subsets": best, "meta": meta, "environment": environment()})
    tables.selection(rows).print(Console())
    for b in best:
        Console().print(
            f"greedy {b['objective']} reaches {b['mean']:.1%} of the best of all {b['subsets']} subsets on average and "
            f"{b['least']:.1%} at worst ({PICK} of {SMALL} tokens, {b['draws']} draws)"
        )
    return 0


@torch.inference_mode()
def look(model: Any, processor: Any, path: Path, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``(1, N, D)`` of the layer below the last, class-token attention ``(1, N)``, and a made-up text."""
    pixels = torch.nn.functional.interpolate(load_batch([path], processor), size=(side, side), mode="bicubic")
    kept: dict[str, Tensor] = {}
    block = model.layers[-2] if hasattr(model, "layers") else model.encoder.layer[-2]
    hook = block.register_forward_pre_hook(
        lambda module, args, kwargs: kept.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    hidden = model(pixels, output_hidden_states=True).hidden_states[-2]
    hook.remove()
    x, inside = kept["x"], block.attention
    normed = block.norm1(x)
    part = inside if hasattr(inside, "q_proj") else inside.attention
    heads = model.config.num_attention_heads
    query, key = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (part.q_proj(normed), part.k_proj(normed)))
    row = (query[:, :, :1] @ key.transpose(2, 3) * (x.shape[-1] // heads) ** -0.5).softmax(-1)[:, :, 0].sum(1)
    draws = torch.Generator().manual_seed(0)
    return hidden[:, 1:], row[:, 1:], torch.randn(1, 40, hidden.shape[-1], generator=draws)


def ways(
    x: Tensor, saliency: Tensor, text: Tensor
) -> Iterator[tuple[str, int, Callable[[], Tensor], Callable[[], Tensor]]]:
    """Name, count, our way and the plain one."""
    n = x.shape[1]
    for share in (0.25, 0.11):
        k, near = round(share * n), round(0.8 * n)
        yield "scope", k, partial(own_scope, x, saliency, k), partial(plain_scope, x[0], saliency[0], k)
        yield "trimtokenator", k, partial(own_trim, x, text, near, k), partial(plain_trim, x[0], text[0], near, k)


def own_scope(x: Tensor, saliency: Tensor, count: int) -> Tensor:
    """As `quickmerge.SCOPE` does it."""
    return cover(x, count, saliency, lazy=True).order[0]


def own_trim(x: Tensor, text: Tensor, near: int, count: int) -> Tensor:
    """As `quickmerge.TrimTokenator` does it."""
    left = alignment(x, text)[0].argsort(descending=True, stable=True)[:near].sort().values
    return left[disperse(x[:, left], count).order[0]]


def plain_scope(x: Tensor, saliency: Tensor, count: int) -> Tensor:
    """Every gain in every step."""
    unit = normalize(x, dim=-1)
    similar, order = (unit @ unit.T).clamp_min(0), []
    covered, free = torch.zeros(len(x)), torch.ones(len(x), dtype=torch.bool)
    for _ in range(count):
        score = (similar - covered[:, None]).clamp_min(0).sum(0) * saliency
        pick = score.where(free, -torch.inf).argmax()
        free[pick], covered = False, torch.maximum(covered, similar[pick])
        order.append(pick)
    return torch.stack(order)


def plain_trim(x: Tensor, text: Tensor, near: int, count: int) -> Tensor:
    """All pairs with the text, then the mean similarity with all that were chosen, anew in every step."""
    left = (-torch.cdist(x, text).square().mean(1)).topk(near).indices.sort().values
    unit = normalize(x[left], dim=-1)
    similar, free = unit @ unit.T, torch.ones(near, dtype=torch.bool)
    order = [similar.mean(1).argmin()]
    free[order[0]] = False
    for _ in range(count - 1):
        mean = similar[:, torch.stack(order)].mean(1)
        order.append(mean.where(free, torch.inf).argmin())
        free[order[-1]] = False
    return left[torch.stack(order)]


def both(ours: Callable[[], Tensor], plain: Callable[[], Tensor]) -> tuple[float, float]:
    """Seconds of both, one after the other, after one round that does not count."""

    def timed(way: Callable[[], Tensor], *_: object) -> float:
        return seconds_of(way)

    (own,), (other,) = interleave([ours, plain], [None], timed, warm_up=timed)
    return own, other


def against_all_subsets(objective: str, model: Any, processor: Any, paths: list[Path]) -> dict[str, Any]:
    """What greedy reaches of the best subset, on draws of a few tokens of each image."""
    subsets = torch.tensor(list(combinations(range(SMALL), PICK)))
    draws, share = torch.Generator().manual_seed(0), []
    for index in range(DRAWS):
        x = look(model, processor, paths[index % len(paths)], 224)[0].double()
        x = x[:, torch.randperm(x.shape[1], generator=draws)[:SMALL]]
        unit = normalize(x[0], dim=-1)
        if objective == "coverage":
            similar = (unit @ unit.T).clamp_min(0)
            value = similar[:, subsets].amax(-1).sum(0)
            chosen = cover(x, PICK).index[0]
        else:
            far = 1 - unit @ unit.T
            value = far[subsets[:, :, None], subsets[:, None]].sum((1, 2))
            chosen = disperse(x, PICK).index[0]
        greedy = value[(subsets == chosen).all(-1)]
        share.append(float(greedy / value.max()))
    return {
        "objective": objective, "mean": statistics.mean(share), "least": min(share), "draws": DRAWS,
        "subsets": len(subsets), "tokens": SMALL, "keep": PICK,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
