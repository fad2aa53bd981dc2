"""``metrics.jsonl``: what was measured, one line per interval, as if the run had never been interrupted."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes

__all__ = ["NAMES", "Meter", "append_line", "cut_after"]

NAMES = ("step", "learning_rate", "grad_norm", "items", "seconds", "items_per_second")
"""What the loop writes into every line; an objective may not return metrics of these names."""


@dataclass
class Meter:
    """Sums the metrics of an interval. It goes into checkpoints as a dict: an interval may outlast a process.

    Args:
        seconds: training time at which the interval began.
        items: how many items all processes have seen in it.
        sums: of each metric over the interval's steps.
        counts: how many of these steps each sum counts.
    """

    seconds: float = 0.0
    items: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, float], items: int) -> None:
        """Count a step. What is not finite is left out: in fp16 a step's gradient may overflow."""
        self.items += items
        for name, value in metrics.items():
            finite = math.isfinite(value)  # a name that never was still gets its column
            self.sums[name] = self.sums.get(name, 0.0) + (value if finite else 0.0)
            self.counts[name] = self.counts.get(name, 0) + finite

    def line(self, step: int, *, rate: float, items: int, seconds: float) -> dict[str, Any]:
        """The interval's line, with the mean of each metric (None if it never was finite).

        Args:
            step: how many steps are done.
            rate: learning rate of the last of them.
            items: how many items all processes have seen since step 0.
            seconds: training time since step 0.
        """
        means = {name: total / self.counts[name] if self.counts[name] else None for name, total in self.sums.items()}
        speed = self.items / max(seconds - self.seconds, 1e-9)
        times = {"seconds": round(seconds, 3), "items_per_second": round(speed, 3)}
        return {"step": step, **means, "learning_rate": rate, "items": items, **times}


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one line to the file.

    Raises:
        QuickmergeError: the disk is full or not writable.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint of this step may follow, and must not outlast the line
    except OSError as error:
        raise QuickmergeError(f"{path} can't be written ({error.strerror})") from error


def cut_after(path: Path, step: int) -> None:
    """Leave only the lines of steps up to `step`; a line that a kill cut short goes too. Makes the file if need be.

    Raises:
        QuickmergeError: the disk is full or not writable.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    write_bytes(path, b"".join(line for line in lines if _step_of(line) <= step))


def _step_of(line: bytes) -> float:
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf  # no end: cut short
    except (ValueError, KeyError, TypeError):
        return math.inf
