"""What matching pursuit over a vocabulary costs: writes benchmarks/results/omp_speed.json.

    python benchmarks/omp_speed.py [--targets 5000] [--atoms 20000] [--width 512] [--k 16 64] [--threads 1]

The straightforward form multiplies all residuals with all atoms in every step, takes the largest, and adds it to a
basis by Gram-Schmidt; it works in the same batches and reuses its buffers. Ours screens in bfloat16. The ways take
turns, block of targets by block of targets, on normal random numbers. Ratios are over all blocks; their quartiles are
over blocks. The floor is the float32 matrix product alone, in the same blocks; a few steps of it are timed and counted
for all. Times are of this process's CPU, so that other work on the machine doesn't count as ours.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transplant_tables
from rich.console import Console
from torch import Tensor

from quickmerge.bench.harness import environment, interleave
from quickmerge.bench.stats import quartiles
from quickmerge.console.options import progress, write_json
from quickmerge.transplant.matching_pursuit import Sparse, combine, fast_bfloat16, omp

HERE = Path(__file__).parent
BATCH = 256
"""Targets at once, for everybody."""
FLOOR = 4
"""Steps of the floor that are timed."""


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=5000)
    parser.add_argument("--atoms", type=int, default=20000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--blocks", type=int, default=4, help="blocks of targets, between which the ways take turns")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "omp_speed.json")
    args = parser.parse_args()
    if args.blocks < 2:
        parser.error(f"--blocks must be at least 2, got {args.blocks}")
    torch.set_num_threads(args.threads)
    rng = torch.Generator().manual_seed(0)
    targets = torch.randn(args.targets, args.width, generator=rng)
    atoms = torch.randn(args.atoms, args.width, generator=rng)
    with progress() as bar, torch.inference_mode():
        task = bar.add_task("timing", total=len(args.k) * args.blocks * len(WAYS))
        rows = [measure(targets, atoms, k, args.blocks, lambda: bar.update(task, advance=1)) for k in args.k]
    meta = {
        "targets": args.targets, "atoms": args.atoms, "width": args.width, "blocks": args.blocks, "batch": BATCH,
        "dtype": "float32", "threads": args.threads, "fast_bfloat16": fast_bfloat16(),
    }  # fmt: skip
    write_json(args.out, {"rows": rows, "meta": meta, "environment": environment()})
    show(rows)
    return 0


def plain_omp(targets: Tensor, atoms: Tensor, k: int) -> Sparse:
    """As one would write it for a batch: one product with all atoms a step, one pass of Gram-Schmidt."""
    out_index, out_weight = torch.empty(len(targets), k, dtype=torch.long), targets.new_empty(len(targets), k)
    room = targets.new_empty(min(BATCH, len(targets)), len(atoms))
    for start in range(0, len(targets), BATCH):
        x = targets[start : start + BATCH]
        n = len(x)
        each = torch.arange(n)
        basis, triangle = x.new_zeros(n, k, x.shape[1]), x.new_zeros(n, k, k)
        index = torch.empty(n, k, dtype=torch.long)
        residual = x
        for t in range(k):
            score = torch.mm(residual, atoms.T, out=room[:n]).abs_()
            score[each[:, None], index[:, :t]] = -1.0
            index[:, t] = score.argmax(1)
            new = atoms[index[:, t]]
            if t:
                height = torch.bmm(basis[:, :t], new[:, :, None])
                new = new - torch.bmm(height.mT, basis[:, :t])[:, 0]
                triangle[:, :t, t] = height[..., 0]
            size = new.norm(dim=1)
            triangle[:, t, t] = size
            basis[:, t] = new / size[:, None]
            along = torch.bmm(basis[:, : t + 1], x[:, :, None])
            residual = x - torch.bmm(along.mT, basis[:, : t + 1])[:, 0]
        weight = torch.linalg.solve_triangular(triangle, along, upper=True)[..., 0]
        out_index[start : start + n], out_weight[start : start + n] = index, weight
    return Sparse(out_index, out_weight)


def products(targets: Tensor, atoms: Tensor, k: int) -> None:
    """The float32 products of k steps, but at most of `FLOOR`, and nothing else."""
    room = targets.new_empty(min(BATCH, len(targets)), len(atoms))
    for part in targets.split(BATCH):
        for _ in range(min(k, FLOOR)):
            torch.mm(part, atoms.T, out=room[: len(part)])


WAYS: dict[str, Callable[[Tensor, Tensor, int], Any]] = {
    "straightforward": plain_omp,
    "screened": lambda targets, atoms, k: omp(targets, atoms, k, batch=BATCH, screen=True),
    "floor": products,
}


def measure(targets: Tensor, atoms: Tensor, k: int, blocks: int, advance: Callable[[], None]) -> dict[str, Any]:
    """All ways at one k."""

    def timed(name: str, block: Tensor, number: int) -> tuple[float, Any]:
        began = time.process_time()  # of the CPU, whatever else runs
        result = WAYS[name](block, atoms, k)
        spent = time.process_time() - began
        advance()
        return spent * max(1, k / FLOOR) if name == "floor" else spent, result

    def begun(name: str, block: Tensor, number: int) -> None:
        WAYS[name](block[:BATCH], atoms, 2)

    found = dict(zip(WAYS, interleave(list(WAYS), targets.chunk(blocks), timed, warm_up=begun), strict=True))
    seconds = {name: [spent for spent, _ in each] for name, each in found.items()}
    whole = {name: _whole([result for _, result in each]) for name, each in found.items() if name != "floor"}
    plain = whole["straightforward"]
    left = (targets - combine(plain, atoms)).norm(dim=1) / targets.norm(dim=1)
    total = {name: sum(times) for name, times in seconds.items()}
    return {
        "k": k, "seconds": total, "seconds_of_blocks": seconds, "relative_residual": float(left.mean()),
        "speedup": {name: speedup(seconds["straightforward"], times) for name, times in seconds.items()},
        "differences": differences(targets, atoms, plain, whole["screened"]),
    }  # fmt: skip


def _whole(parts: list[Sparse]) -> Sparse:
    return Sparse(torch.cat([p.indices for p in parts]), torch.cat([p.weights for p in parts]))


def speedup(plain: list[float], other: list[float]) -> dict[str, float]:
    """The ratio of all, and the quartiles over blocks."""
    low, _, high = quartiles([a / b for a, b in zip(plain, other, strict=True)])
    return {"ratio": sum(plain) / sum(other), "low": low, "high": high}


def differences(targets: Tensor, atoms: Tensor, plain: Sparse, other: Sparse) -> dict[str, Any]:
    """Targets whose choices differ, and how near a tie the first choice that differs was.

    ``gap`` is the difference of the two correlations in float64, of the larger one; float32 has about 1e-7.
    """
    differ = (plain.indices != other.indices).any(1).nonzero().flatten().tolist()
    gaps = []
    for row in differ:
        step = int((plain.indices[row] != other.indices[row]).int().argmax())
        support = atoms[plain.indices[row, :step]].double()
        x = targets[row].double()
        residual = x - torch.linalg.lstsq(support.T, x[:, None]).solution[:, 0] @ support if step else x
        both = torch.stack([plain.indices[row, step], other.indices[row, step]])
        pair = (atoms[both].double() @ residual).abs()
        gaps.append(float((pair.max() - pair.min()) / pair.max()))
    same = (plain.indices == other.indices).all(1)
    apart = (plain.weights - other.weights).abs()[same].flatten().tolist()
    return {"targets": len(differ), "largest_gap": max(gaps, default=0.0), "weights_apart": max(apart, default=0.0)}


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows."""
    transplant_tables.speed(rows).print(Console())
    for r in rows:
        d = r["differences"]
        gap = f", the first difference at a gap of at most {d['largest_gap']:.0e}" if d["targets"] else ""
        Console().print(f"k={r['k']}: {d['targets']} targets got other atoms{gap}")


if __name__ == "__main__":
    sys.exit(main())
