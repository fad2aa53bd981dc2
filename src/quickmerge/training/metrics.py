"""``metrics.jsonl``: what was measured, one line per interval, as if the run had never been interrupted."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes

__all__ = [
    "NAMES",
    "Meter",
    "Show",
    "Stream",
    "append_line",
    "cut_after",
    "seed_generators",
    "share_shown",
    "shown",
    "stable_hash",
]


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


# Which items a step sees and what is random in it: pure functions of the seed, so that no state is saved.


def stable_hash(*parts: int | str) -> int:
    """A number in [0, 2^63) that is the same in every process and on every machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def seed_generators(seed: int, step: int, micro: int, rank: int) -> None:
    """Seed torch (all devices), numpy and Python for one micro-step of one process."""
    number = stable_hash("micro-step", seed, step, micro, rank)
    random.seed(number)
    np.random.seed(number % 2**32)
    torch.manual_seed(number)


class Stream:
    """The endless sequence of a dataset's items: one permutation after another, one per epoch.

    Args:
        items: how many the dataset has.
        seed: together with an epoch's number it decides on its permutation.
    """

    def __init__(self, items: int, seed: int) -> None:
        self.items = items
        self.seed = seed
        self._epochs: dict[int, Tensor] = {}

    def take(self, start: int, stop: int) -> list[int]:
        """The items' indices at the places `start` to `stop` (without) of the sequence."""
        taken: list[int] = []
        while start < stop:
            epoch, first = divmod(start, self.items)
            last = min(first + stop - start, self.items)
            taken += self._permutation(epoch)[first:last].tolist()
            start += last - first
        return taken

    def micro_steps(
        self, step: int, *, batch: int, accumulate: int, processes: int = 1, rank: int = 0
    ) -> list[list[int]]:
        """The indices of each of the `accumulate` micro-steps of one process in one step, `batch` of them each.

        A step reads the next ``batch * accumulate * processes`` places. Each process takes one stretch of them, so
        that all together read what a single process with a larger batch would.
        """
        share = batch * accumulate
        start = (step * processes + rank) * share
        taken = self.take(start, start + share)
        return [taken[first : first + batch] for first in range(0, share, batch)]

    def _permutation(self, epoch: int) -> Tensor:
        if epoch not in self._epochs:
            # A step seldom spans more than two epochs, and a permutation may be large.
            self._epochs = {known: order for known, order in self._epochs.items() if known == epoch - 1}
            generator = torch.Generator().manual_seed(stable_hash("epoch", self.seed, epoch))
            self._epochs[epoch] = torch.randperm(self.items, generator=generator)
        return self._epochs[epoch]


# What a run shows on stderr while it goes on.


Show = Callable[[int, float, float], None]
"""Called after a step with the steps done, the loss and the items per second."""


@contextmanager
def shown(done: int, steps: int, visible: bool) -> Iterator[Show]:
    """A progress bar of the steps, with the loss, the speed and the time left.

    Args:
        done: steps done before.
        steps: all steps.
        visible: False shows nothing; only one of several processes should.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from quickmerge.terminal import PlainColumn, Terminal

    bar = Progress(
        PlainColumn(),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[measured]}"),
        TimeRemainingColumn(),
        console=Terminal(stderr=True),
        transient=True,
        disable=not visible,
    )
    with bar:
        task = bar.add_task("training", completed=done, total=steps, measured="")

        def show(done: int, loss: float, speed: float) -> None:
            bar.update(task, completed=done, measured=f"loss {loss:.4g}, {speed:.3g} items/s, left")

        yield show


@contextmanager
def share_shown(what: str) -> Iterator[Callable[[float], None]]:
    """A progress bar of something that tells the share of it that is done."""
    from rich.progress import BarColumn, Progress, TimeRemainingColumn

    from quickmerge.terminal import PlainColumn, Terminal

    columns = (PlainColumn(), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Terminal(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=1.0)
        yield lambda share: bar.update(task, completed=share)
