"""A small thing to train, and helpers that run scripts and compare what runs leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quickmerge.training import Objective, TrainingConfig


class Small(Objective):
    """Two layers and dropout, so that a run depends on its random numbers."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.progress: list[float] = []

    def forward(self, batch: list[Tensor], progress: float) -> dict[str, Tensor]:
        self.progress.append(progress)
        self.seen += 1
        error = self.net(batch[0]) - batch[1]
        return {"loss": error.square().mean(), "distance": error.abs().mean()}


class Points:
    """Points and the sum of their coordinates; `broken` is an item whose coordinates are NaN."""

    def __init__(self, items: int = 37, broken: int | None = None) -> None:
        self.items = items
        self.broken = broken

    def __len__(self) -> int:
        return self.items

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        point = torch.randn(4, generator=torch.Generator().manual_seed(index))
        if index == self.broken:
            point = point * torch.nan
        return point, point.sum(0, keepdim=True)


class NamedPoints(Points):
    def describe(self, index: int) -> str:
        return f"point {index}"


def settings(**changes: Any) -> TrainingConfig:
    """A short run."""
    return TrainingConfig(
        **{"steps": 12, "batch": 4, "learning_rate": 1e-2, "save_every": 5, "log_every": 3, **changes}
    )


def lines(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run, apart from times."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in line.items() if name not in ("seconds", "items_per_second")} for line in read]


def saved(out: Path) -> list[str]:
    """What is in the folder of checkpoints, hidden names too."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def same(one: nn.Module, other: nn.Module) -> bool:
    """True if all tensors are equal to the last bit."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def run_script(name: str, *arguments: Any, timeout: float = 120) -> str:
    """Run a script of this folder in a process of its own. Returns what it prints; fails if it fails."""
    command = [sys.executable, str(Path(__file__).parent / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
