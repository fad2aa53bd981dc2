"""What a training run is told. Without torch, so that the command line can make its options of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.files import read_settings

__all__ = ["PRECISIONS", "SCHEDULES", "TRACKERS", "TrainingConfig", "check_trackers", "tracker_names"]


SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("no", "bf16", "fp16")
TRACKERS = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",)}
"""What a run may be shown by, and the packages any of which does it."""


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of `quickmerge.training.train`.

    Args:
        steps: optimizer steps of the whole run.
        batch: items per process and micro-step.
        accumulate: micro-steps per step; a step averages over ``batch * accumulate * processes`` items.
        learning_rate: the highest rate, which the warm-up ends at.
        warmup: steps over which the rate rises from nothing; at most `steps`.
        schedule: how the rate goes on: ``"constant"``, or down by a ``"linear"`` or ``"cosine"`` curve.
        final: share of the rate that the curve ends at in the last step, in [0, 1].
        weight_decay: AdamW's decay, of parameters of two or more dimensions only.
        betas: AdamW's decay rates of the two moments, each in [0, 1).
        clip: the gradient is scaled down to this norm; None never.
        precision: what autocast computes in: ``"no"``, ``"bf16"``, ``"fp16"`` (GPU only).
        seed: of the order of the data and of what is random in a step.
        save_every: steps between checkpoints; the last step always makes one.
        log_every: steps that a line of ``metrics.jsonl`` is the mean of.
        max_minutes: stop after the step in which this call has run so long; None never.
        log_with: trackers, with commas: tensorboard, wandb, trackio; told what goes into ``metrics.jsonl``.

    Raises:
        ValueError: a setting is not allowed; the message names it, what was given and what is allowed.
    """

    steps: int
    batch: int = 16
    accumulate: int = 1
    learning_rate: float = 3e-4
    warmup: int = 0
    schedule: str = "cosine"
    final: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float | None = 1.0
    precision: str = "no"
    seed: int = 0
    save_every: int = 500
    log_every: int = 10
    max_minutes: float | None = None
    log_with: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every", "log_every"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        for name in ("warmup", "seed"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), 0))
        if self.warmup > self.steps:
            raise ValueError(f"warmup must be at most steps ({self.steps}), got {self.warmup}")
        _number("learning_rate", self.learning_rate, "above 0", lambda value: value > 0)
        _number("final", self.final, "in [0, 1]", lambda value: 0 <= value <= 1)
        _number("weight_decay", self.weight_decay, "of at least 0", lambda value: value >= 0)
        for name in ("clip", "max_minutes"):
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), "above 0, or None", lambda value: value > 0)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas!r}")
        for beta in self.betas:
            _number("each of betas", beta, "in [0, 1)", lambda value: 0 <= value < 1)
        object.__setattr__(self, "betas", tuple(self.betas))  # a file holds a list
        if self.log_with is not None:
            tracker_names(self.log_with)
        for name, allowed in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            given = getattr(self, name)
            if given not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {given!r}")

    def to_dict(self) -> dict[str, Any]:
        """All settings, as JSON holds them."""
        return {**asdict(self), "betas": list(self.betas)}

    @classmethod
    def from_file(cls, path: Path | str) -> TrainingConfig:
        """Read settings from a YAML, TOML or JSON file; what is left out has its default.

        Raises:
            QuickmergeError: the file can't be read, holds an unknown setting, or one that is not allowed.
        """
        path = Path(path)
        given = read_settings(path)
        names = [field.name for field in fields(cls)]
        for name in given:
            if name not in names:
                known = near_match(name, names) or f": known are {', '.join(names)}"
                raise QuickmergeError(f"{path} holds an unknown setting {name!r}{known}")
        if "steps" not in given:
            raise QuickmergeError(f"{path} must say how many steps to train for (steps)")
        try:
            return cls(**given)
        except ValueError as error:
            raise QuickmergeError(f"{path}: {error}") from None


def tracker_names(text: object) -> list[str]:
    """The trackers that ``log_with`` names.

    Raises:
        ValueError: one is unknown.
    """
    names = [name.strip() for name in text.split(",")] if isinstance(text, str) else [text]
    for name in names:
        if name not in TRACKERS:
            near = near_match(str(name), TRACKERS)
            raise ValueError(f"log_with must be of {', '.join(TRACKERS)}, with commas, got {name!r}{near}")
    return list(dict.fromkeys(map(str, names)))


def check_trackers(config: TrainingConfig) -> None:
    """See that every tracker that is asked for is installed, without importing one.

    Raises:
        QuickmergeError: one is not; the message says what to install.
    """
    for name in tracker_names(config.log_with) if config.log_with is not None else []:
        if not any(find_spec(package) for package in TRACKERS[name]):
            raise QuickmergeError(f"log_with {name} needs the package {name}: pip install {name}")


def _number(name: str, value: object, words: str, allowed: Callable[[float], bool]) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and allowed(value)):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a number {words}, got {value!r}")
