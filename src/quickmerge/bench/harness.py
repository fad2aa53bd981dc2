"""What every benchmark does alike: arms that take turns, one clock, and a result that says where it was measured."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

__all__ = ["Arm", "Lapse", "Mark", "Result", "environment", "interleave", "mark", "now", "seconds_of", "settled"]


def environment() -> dict[str, str]:
    """Versions and hardware, for every committed result."""
    import os

    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            cpu = next((line.split(":", 1)[1].strip() for line in f if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": f"{cpu}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "gpu": gpu,
    }


# Arms that take turns.


A = TypeVar("A")
I = TypeVar("I")  # noqa: E741
T = TypeVar("T")


@dataclass(frozen=True)
class Arm:
    """One of the ways that are compared: what tables call it, and what is done to the model meanwhile.

    Attributes:
        name: what tables call it.
        attach: makes what is entered while the arm has its turn, such as a run of `quickmerge.reduce`; None for the
            model as it is.
        settings: whatever else the arm differs in. ``keep`` is the share that was asked for, in a benchmark's own unit.
        ingredients: what would do the same to a model as a recipe, by the arguments of `quickmerge.Recipe`; a reducer
            that is told where to act as a tuple, the arguments of `quickmerge.Merge`. Empty for what is no recipe.
    """

    name: str
    attach: Callable[..., AbstractContextManager[Any]] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    ingredients: Mapping[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> float | None:
        """The share that was asked for, None for an arm that comes as it is."""
        share: float | None = self.settings.get("keep")
        return share

    @property
    def label(self) -> str:
        """What it is called while it is measured."""
        return self.name if self.keep in (None, 1) else f"{self.name} {self.keep:g}"

    def context(self, *given: Any) -> AbstractContextManager[Any]:
        """What to enter for a turn: what ``attach`` makes of ``given``, or nothing."""
        return nullcontext() if self.attach is None else self.attach(*given)


def interleave(
    arms: Sequence[A],
    items: Sequence[I],
    measure: Callable[[A, I, int], T],
    *,
    rounds: int = 1,
    first: int = 0,
    warm_up: Callable[[A, I, int], object] | None = None,
) -> list[list[T]]:
    """Let every arm take its turn at every item, in an order that turns from item to item.

    So a machine that slows down, or a cache that fills, is no arm's own.

    Args:
        arms: the ways that are compared.
        items: what each is measured on, such as images or prompts.
        measure: called with an arm, an item and the item's number.
        rounds: how often all items come up.
        first: the number of the first item, where the items are some of many.
        warm_up: called once for each arm before all else, with the first item; what it gives is thrown away.

    Returns:
        For each arm what ``measure`` gave, ``len(items) * rounds`` of it in the order of the items' numbers.
    """
    if warm_up is not None:
        for arm in arms:
            warm_up(arm, items[0], first)
    found: list[list[T]] = [[] for _ in arms]
    for number, item in enumerate([*items] * rounds, first):
        for turn in range(len(arms)):
            at = (turn + number) % len(arms)
            found[at].append(measure(arms[at], item, number))
    return found


def now(device: torch.device | str | None = None) -> float:
    """Seconds by a clock that runs evenly, read after ``device`` has done all that it was given (None: the CPU)."""
    if device is not None and torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# A clock that nobody waits for.


PENDING = 32
"""Stretches that a `Lapse` holds before it looks which of them have ended."""


@dataclass(frozen=True)
class Mark:
    """A place in what a GPU was given to do; marks are subtracted from one another as readings of a clock are."""

    event: Any

    def __sub__(self, began: Mark) -> Lapse:
        return Lapse(((began.event, self.event),))


class Lapse:
    """Seconds between marks, which add up like numbers; ``float`` waits until the GPU has come by all of them.

    Args:
        pairs: events of beginnings and ends.
        known: seconds that have been read off already.
    """

    def __init__(self, pairs: tuple[tuple[Any, Any], ...] = (), known: float = 0.0) -> None:
        self._pairs, self._known = pairs, known

    def __add__(self, other: Lapse | float) -> Lapse:
        if not isinstance(other, Lapse):
            return Lapse(self._pairs, self._known + other)
        both = Lapse(self._pairs + other._pairs, self._known + other._known)
        if len(both._pairs) > PENDING:
            both._read(lambda event: bool(event.query()))
        return both

    __radd__ = __add__

    def __float__(self) -> float:
        def passed(event: Any) -> bool:
            event.synchronize()
            return True

        self._read(passed)
        return self._known

    def __deepcopy__(self, memo: Any) -> Lapse:
        return Lapse(self._pairs, self._known)

    def __reduce__(self) -> Any:
        return float, (float(self),)

    def _read(self, passed: Callable[[Any], bool]) -> None:
        """Read off what has ended, from the front on; a GPU comes by marks in their order."""
        while self._pairs and passed(self._pairs[0][1]):
            began, ended = self._pairs[0]
            self._known += began.elapsed_time(ended) / 1e3
            self._pairs = self._pairs[1:]


def mark(device: torch.device | str | None = None) -> Any:
    """A reading of the clock that waits for nothing: seconds as a float, or a `Mark` in what a GPU was given to do.

    The difference of two is a float or a `Lapse`, which a float can be added to.
    """
    if device is None or torch.device(device).type != "cuda":
        return time.perf_counter()
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return Mark(event)


def settled(held: Any) -> Any:
    """The same object, every `Lapse` among its attributes now a number: this waits for the GPU."""
    for name, value in vars(held).items():
        if isinstance(value, Lapse):
            setattr(held, name, float(value))
    return held


def seconds_of(call: Callable[[], Any], device: torch.device | str | None = None) -> float:
    """Seconds that ``call`` takes, until ``device`` has done all of it."""
    began = now(device)
    call()
    return now(device) - began


@dataclass
class Result:
    """What a benchmark found.

    Attributes:
        rows: a line for each arm, as tables show them.
        records: what they are made of, one for each arm and item.
        meta: what was measured with which settings; the environment is always among it.
    """

    rows: list[dict[str, Any]]
    records: list[dict[str, Any]]
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.meta = {**self.meta, "environment": self.meta.get("environment") or environment()}

    def about(self, **meta: Any) -> Result:
        """The same with more of what was measured."""
        return Result(self.rows, self.records, {**meta, **self.meta})

    def as_dict(self, records: str = "records", **more: Any) -> dict[str, Any]:
        """Everything, for JSON; ``records`` is what those are called there, and ``more`` are further lists."""
        return {"rows": self.rows, records: self.records, **more, "meta": self.meta}
