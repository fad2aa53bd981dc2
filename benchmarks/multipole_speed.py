"""What a step of multipole attention costs beside dense attention: writes benchmarks/results/multipole_speed.json.

    python benchmarks/multipole_speed.py [--tokens 8192 16384 ...] [--shapes llama-8b smollm2] [--device cuda]

Keys and values are drawn around centres; they are clustered as a prompt is. Dense attention in several forms and
multipole attention take turns in one run, and ratios are taken round by round against the fastest of the dense forms.
The cost of updating the clusters is measured and spread over the steps between two updates. The limit is what the bytes
allow: dense attention reads all keys and values, multipole attention centroids, sink, buffer and the budget.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import multipole_tables
import torch
from multipole_arms import clustered
from rich.console import Console
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import quickmerge as qm
from quickmerge.bench.harness import environment, interleave, seconds_of
from quickmerge.bench.stats import quartiles, spread
from quickmerge.console.options import progress, write_json
from quickmerge.multipole.attend import attend_and_count
from quickmerge.multipole.clustering import cluster, extend

HERE = Path(__file__).parent


class Shape(NamedTuple):
    """Query heads, key-value heads, and the width of one."""

    queries: int
    heads: int
    width: int


SHAPES = {"llama-8b": Shape(32, 8, 128), "smollm2": Shape(9, 3, 64)}
NEAR = 32
"""About as many keys lie around each centre."""
BLOCK = 1 << 28
"""Numbers that are summed to see how fast memory is: 1 GiB, more than any cache holds."""


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072])
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--updates", type=int, default=5, help="how often an update is timed")
    parser.add_argument("--prefill", type=int, default=8192, help="most tokens whose dense prefill is timed too")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "multipole_speed.json")
    args = parser.parse_args()
    if min(args.rounds, args.updates) < 2:
        parser.error(f"--rounds and --updates must be at least 2, got {args.rounds} and {args.updates}")
    if args.threads:
        torch.set_num_threads(args.threads)
    rows = []
    with progress() as bar, torch.inference_mode():
        task = bar.add_task("timing", total=len(args.shapes) * len(args.tokens))
        for name in args.shapes:
            for tokens in args.tokens:
                bar.update(task, description=f"{name}, {tokens} tokens")
                rows.append({"shape": name, **measure(SHAPES[name], tokens, args)})
                bar.update(task, advance=1)
        found = bandwidth(args.device)
    meta = {
        "settings": asdict(qm.Multipole(budget=args.budget)), "batch": args.batch, "rounds": args.rounds,
        "dtype": args.dtype, "device": args.device, "bandwidth": found,
        "shapes": {name: SHAPES[name]._asdict() for name in args.shapes},
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    show(rows)
    return 0


def measure(shape: Shape, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """One shape at one length: steps, updates, and the clustering of the prompt."""
    settings = qm.Multipole(budget=args.budget)
    query, keys, values = drawn(shape, tokens, args)
    first, last = clustered(tokens - 1, settings)
    start, end = (torch.full((args.batch,), column, device=args.device) for column in (first, last))
    seconds = partial(seconds_of, device=args.device)
    built: list[Any] = []
    clustering = seconds(lambda: built.append(cluster(keys, values, None, start, end - settings.interval, settings)))
    updates = [
        seconds(lambda: built.append(extend(built[0], keys, values, None, end, settings)))
        for _ in range(args.updates + 1)
    ][1:]
    clusters = built[-1]
    scaling = shape.width**-0.5
    step = partial(attend_and_count, query, keys, values, None, clusters, settings, scaling=scaling)
    ways: dict[str, Callable[[], Any]] = {
        **{name: lambda way=way: way(query, keys, values, scaling) for name, way in DENSE.items()},
        "multipole": step,
    }  # fmt: skip

    def timed(name: str, *_: object) -> float:
        return seconds(ways[name])

    seen = dict(zip(ways, interleave(list(ways), [None], timed, rounds=args.rounds, warm_up=timed), strict=True))
    kept = float(step()[1].float().mean())
    fastest = min(DENSE, key=lambda name: statistics.median(seen[name]))
    update = statistics.median(updates) / settings.interval
    return {
        "tokens": tokens, "clusters": len(clusters), "rows_chosen": kept,
        "seconds": {name: quartiles(times) for name, times in seen.items()}, "fastest": fastest,
        **ratios(seen[fastest], seen["multipole"], update),
        **limit(shape, tokens, clusters, kept, first + tokens - last, args, statistics.median(seen[fastest]),
                statistics.median(seen["multipole"])),
        "update_seconds": statistics.median(updates), "update_seconds_per_step": update,
        "clustering_seconds": clustering, "cluster_bytes": clusters.bytes,
        "steps_until_paid": paid(clustering, statistics.median(seen[fastest]),
                                 statistics.median(seen["multipole"]) + update),
        "prefill_seconds": prefill(shape, tokens, keys, values, args) if tokens <= args.prefill else None,
    }  # fmt: skip


def drawn(shape: Shape, tokens: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``(B, Hq, 1, D)``, keys and values ``(B, H, N, D)``: normal around normal centres, half as far."""
    rng = torch.Generator().manual_seed(0)
    dtype = getattr(torch, args.dtype)
    size = (args.batch, shape.heads, tokens, shape.width)
    centres = torch.randn(2, max(1, tokens // NEAR), shape.width, generator=rng)
    whose = torch.randint(centres.shape[1], size[:3], generator=rng)
    keys, values = (centre[whose].add_(torch.randn(size, generator=rng), alpha=0.5).to(dtype) for centre in centres)
    query = torch.randn(args.batch, shape.queries, 1, shape.width, generator=rng).to(dtype)
    return query.to(args.device), keys.to(args.device), values.to(args.device)


def sdpa(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """What transformers' models call."""
    return scaled_dot_product_attention(query, keys, values, scale=scaling, enable_gqa=True)


def sdpa_grouped(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """Query heads that share a key-value head as rows of one query, so that every key is read once."""
    rows = query.squeeze(2).unflatten(1, (keys.shape[1], -1))
    return scaled_dot_product_attention(rows, keys, values, scale=scaling).flatten(1, 2)[:, :, None]


def matmul_grouped(query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
    """The same by two matrix products."""
    rows = query.squeeze(2).unflatten(1, (keys.shape[1], -1)) * scaling
    return ((rows @ keys.transpose(2, 3)).softmax(-1) @ values).flatten(1, 2)[:, :, None]


DENSE = {"sdpa": sdpa, "sdpa, grouped": sdpa_grouped, "matmul, grouped": matmul_grouped}
"""Ways to the same dense attention of one query."""


def ratios(dense: list[float], multipole: list[float], update: float) -> dict[str, float]:
    """Dense over multipole round by round: the attention alone, and with an even share of the updates."""
    alone = [a / b for a, b in zip(dense, multipole, strict=True)]
    whole = [a / (b + update) for a, b in zip(dense, multipole, strict=True)]
    return spread("speedup", alone) | spread("speedup_with_updates", whole)


def limit(
    shape: Shape,
    tokens: int,
    clusters: Any,
    chosen: float,
    near: int,
    args: argparse.Namespace,
    dense: float,
    own: float,
) -> dict[str, float]:
    """Bytes that must be read, the speed-up that these allow, and how much of it is reached.

    ``near`` are the columns of sink and buffer. Each cluster is read once for its key and once for its value, and for
    each key-value head the keys and values of ``chosen`` members.
    """
    row = args.batch * shape.heads * shape.width * torch.finfo(getattr(torch, args.dtype)).bits // 8
    full, few = 2 * tokens * row, 2 * (len(clusters) + chosen + near) * row
    return {"dense_bytes": full, "multipole_bytes": few, "allowed_by_bytes": full / few,
            "of_allowed": dense / own / (full / few),
            "dense_bytes_per_second": full / dense, "multipole_bytes_per_second": few / own}  # fmt: skip


def paid(clustering: float, dense: float, own: float) -> float | None:
    """Steps after which the clustering of the prompt is paid for; None: never."""
    return clustering / (dense - own) if own < dense else None


def prefill(shape: Shape, tokens: int, keys: Tensor, values: Tensor, args: argparse.Namespace) -> float:
    """Seconds of causal dense attention over the whole prompt, for setting the clustering beside."""
    query = torch.randn(args.batch, shape.queries, tokens, shape.width, dtype=keys.dtype, device=keys.device)
    attend = partial(scaled_dot_product_attention, query, keys, values, is_causal=True, enable_gqa=True)
    return seconds_of(attend, args.device)


def bandwidth(device: str) -> float:
    """Bytes a second that a plain sum over a large block reads here, the best of five."""
    block = torch.ones(BLOCK, device=device)
    return 4 * len(block) / min(seconds_of(block.sum, device) for _ in range(5))


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    multipole_tables.step(rows).print(Console())


if __name__ == "__main__":
    sys.exit(main())
