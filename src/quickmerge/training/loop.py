"""Ctrl-C and SIGTERM wait for the end of a step."""

from __future__ import annotations

import json
import math
import os
import platform
import signal
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import accelerate  # type: ignore[import-untyped]
import torch
from torch.utils.data import default_collate

from quickmerge._version import __version__
from quickmerge.errors import QuickmergeError
from quickmerge.files import settle
from quickmerge.locks import sole_writer
from quickmerge.terminal import say
from quickmerge.training import checkpoint
from quickmerge.training.checkpoint import (
    Checkpoint,
    folders,
    load_model,
    load_optimizer,
    model_tensors,
    newest,
    optimizer_tensors,
    trained_parameters,
)
from quickmerge.training.config import TrainingConfig, check_trackers, tracker_names
from quickmerge.training.metrics import Meter, Show, append_line, cut_after, shown
from quickmerge.training.objective import Dataset, Objective
from quickmerge.training.step import Stepper, on_main, start
from quickmerge.training.trackers import Trackers

__all__ = ["LateSignals", "TrainingResult", "check_same", "find", "run_identity", "train"]


class LateSignals:
    """Within this context the two signals are only noted; a second Ctrl-C interrupts at once.

    A signal that came too late for anybody to ask is delivered when the context ends. In another thread than the
    main one, where Python allows no handlers, signals do what they always do.
    """

    CAUGHT = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> LateSignals:
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays ignored: shells start programs in the background so.
            caught = [number for number in self.CAUGHT if signal.getsignal(number) is not signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._note) for number in caught}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # type: ignore[arg-type]
        if error is None and self.received is not None:
            os.kill(os.getpid(), self.received)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number


# Whether a run may go on from what `out` holds.


FREE = ("max_minutes", "save_every", "log_every", "log_with")
"""Settings that change nothing about what is learnt."""


def run_identity(
    config: TrainingConfig, fingerprint: Mapping[str, Any] | None, items: int, processes: int
) -> dict[str, Any]:
    """All that decides on the course of a run, as JSON holds it.

    Raises:
        QuickmergeError: the fingerprint is nothing that JSON can hold.
    """
    try:
        given = json.loads(json.dumps(dict(fingerprint or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise QuickmergeError(f"fingerprint must hold only what JSON can ({error})") from None
    return {"config": config.to_dict(), "fingerprint": given, "items": items, "processes": processes}


def find(out: Path, resume: bool) -> tuple[Checkpoint | None, list[str]]:
    """What to go on from, and warnings about damaged checkpoints.

    Returns:
        None instead of a checkpoint if `resume` is False.

    Raises:
        QuickmergeError: `resume` is True without a checkpoint, or False with one.
    """
    if not resume:
        if there := folders(out):
            raise QuickmergeError(f"{there[-1]} is there already: use resume=True to go on from it, or another folder")
        return None, []
    found, damaged = newest(out)
    if found is None:
        raise QuickmergeError(f"nothing to resume: no folder {out / 'checkpoints' / 'step-*'} was found")
    return found, damaged


def check_same(out: Path, then: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """See that a run is resumed as what it was.

    Settings that change nothing about what is learnt may differ, and with a constant schedule `steps` may grow.

    Args:
        out: the output folder.
        then: the `run_identity` in the checkpoint, possibly among other things.
        now: this call's.

    Raises:
        QuickmergeError: it differs; the message names the first difference and both values.
    """
    for part, name in (("config", "config "), ("fingerprint", "fingerprint ")):
        before, after = then.get(part, {}), now[part]
        for key in sorted(before.keys() | after.keys()):
            old, new = before.get(key), after.get(key)
            if old != new and not (part == "config" and _may_change(key, old, new, after)):
                raise _differs(out, name + key, old, new)
    for key, name in (("items", "the dataset's length"), ("processes", "the number of processes")):
        if then.get(key) != now[key]:
            raise _differs(out, name, then.get(key), now[key])


def _may_change(key: str, old: Any, new: Any, config: Mapping[str, Any]) -> bool:
    grown = key == "steps" and config["schedule"] == "constant" and isinstance(old, int) and new > old
    return key in FREE or grown


def _differs(out: Path, name: str, old: Any, new: Any) -> QuickmergeError:
    return QuickmergeError(
        f"{name} was {old!r} when {out} was begun and is {new!r} now: make them the same, or use another folder"
    )


# The training loop: one for everything that the project trains.


OnStep = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended.

    Args:
        steps: how many are done, over all calls.
        finished: False if the time ran out before the last step.
        seconds: training time over all calls.
        checkpoint: folder of the last checkpoint.
        metrics: of the last step, means over its items; empty if this call had no step to take.
    """

    steps: int
    finished: bool
    seconds: float
    checkpoint: Path
    metrics: dict[str, float]


def train(
    objective: Objective,
    dataset: Dataset,
    config: TrainingConfig,
    out: Path | str,
    *,
    collate: Callable[[list[Any]], Any] | None = None,
    resume: bool = False,
    fingerprint: Mapping[str, Any] | None = None,
    finish: Callable[[Path], None] | None = None,
    on_step: OnStep | None = None,
) -> TrainingResult:
    """Train an objective, in such a way that a run killed at any moment and resumed ends with the same weights.

    Writes ``out/metrics.jsonl`` and ``out/checkpoints/step-000123/`` (the last two). Under `accelerate launch` or
    `torchrun` every process calls this with the same arguments and a folder that all of them see; each holds the
    whole of what is trained (DDP), and only the main one writes. Where the launcher asks for FSDP2, a frozen base model
    is sharded, which stays so; see `quickmerge.training.sharding`. Other sharding is refused.

    Ctrl-C and SIGTERM end the step, save a checkpoint and say how to go on; then Ctrl-C raises KeyboardInterrupt as
    ever and SIGTERM exits with status 143. The global random generators of torch, numpy and Python are seeded over
    and over, and left so.

    Args:
        objective: what is trained, in place. It ends on the device that it was trained on.
        dataset: the items; `describe(index)`, if it has that, names an item in error messages.
        config: the settings.
        out: the output folder, made if need be.
        collate: makes a batch of a list of items; default is torch's.
        resume: go on from the newest checkpoint in `out`.
        fingerprint: whatever else must be the same for a resumed run (base model, files), as JSON can hold it.
        finish: called with `out` in the main process after the last step, to save what was trained. After a kill
            it may be called once more.
        on_step: called after each step, in every process, with the number of steps done and the step's metrics.

    Raises:
        QuickmergeError: the dataset is empty, nothing is trained, `out` does not fit `resume`, a resumed run differs
            from what it was, another run writes `out` at the same time, the loss or the gradient is not finite, or
            the disk is full. The last checkpoint is kept in any case.
    """
    out = Path(out)
    if len(dataset) == 0:
        raise QuickmergeError("dataset must hold at least one item to train on, got an empty one")
    if not trained_parameters(objective):
        raise QuickmergeError("objective must have a parameter that requires a gradient, got none")
    run = _Run(objective, dataset, config, out, collate or default_collate, fingerprint)
    with ExitStack() as held:
        on_main(run.accelerator, lambda: held.enter_context(sole_writer(out)))
        training = objective.training
        objective.train()
        try:
            run.begin(resume)
            result = run.go(on_step)
        finally:
            objective.train(training)
            run.trackers.end()
        if result.finished and finish is not None:
            on_main(run.accelerator, lambda: finish(out))
    return result


class _Run:
    """A run's state between two steps: what a checkpoint holds."""

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        config: TrainingConfig,
        out: Path,
        collate: Callable[[list[Any]], Any],
        fingerprint: Mapping[str, Any] | None,
    ) -> None:
        self.out = out
        self.config = config
        check_trackers(config)
        names = None if config.log_with is None else tracker_names(config.log_with)
        self.accelerator = start(config.precision, objective.uses_every_parameter, names, out)
        self.trackers = Trackers(self.accelerator, config, out)
        processes = self.accelerator.num_processes
        self.identity = run_identity(config, fingerprint, len(dataset), processes)
        self.stepper = Stepper(objective, dataset, config, collate, self.accelerator)
        self.items = config.batch * config.accumulate * processes
        self.done = 0
        self.before = 0.0  # seconds trained in earlier calls
        self.meter = Meter()
        self.folder = out  # of the last checkpoint

    def begin(self, resume: bool) -> None:
        """Load the checkpoint if there shall be one, and bring `out` to the state that it had then."""
        on_main(self.accelerator, lambda: settle(self.out / "checkpoints"))
        found, damaged = find(self.out, resume)
        if found is not None:
            self._load(found)
            for sentence in damaged if self.accelerator.is_main_process else []:
                say(f"warning: {sentence}; going on from step {found.step}, before it")
        # Only behind this have all processes read, and may the main one write.
        on_main(self.accelerator, self._tidy)
        on_main(self.accelerator, lambda: self.trackers.begin(resume))

    def _tidy(self) -> None:
        checkpoint.prune(self.out, self.done)  # a kill may have come before it
        cut_after(self.out / "metrics.jsonl", self.done)

    def go(self, on_step: OnStep | None) -> TrainingResult:
        """Take the steps that are left."""
        began = time.monotonic()
        metrics: dict[str, float] = {}
        late = False
        visible = bool(self.accelerator.is_main_process)
        with LateSignals() as signals, shown(self.done, self.config.steps, visible) as show:
            while self.done < self.config.steps and not late:
                metrics, late, stopped_by = self._step(began, signals, show)
                if on_step is not None:
                    on_step(self.done, metrics)
                if stopped_by is not None:
                    self._leave(stopped_by)
        seconds = self.before + time.monotonic() - began
        return TrainingResult(self.done, self.done == self.config.steps, seconds, self.folder, metrics)

    def _step(self, began: float, signals: LateSignals, show: Show) -> tuple[dict[str, float], bool, int | None]:
        config = self.config
        taken = self.stepper.take(self.done, lambda: self._flags(began, signals))
        interrupted, terminated, late = (flag > 0 for flag in taken.flags)
        self.done += 1
        seconds = self.before + time.monotonic() - began
        self.meter.add(taken.metrics, self.items)
        speed = self.meter.items / max(seconds - self.meter.seconds, 1e-9)
        show(self.done, taken.metrics["loss"], speed)
        if self.done % config.log_every == 0:
            line = self.meter.line(self.done, rate=taken.rate, items=self.done * self.items, seconds=seconds)
            on_main(self.accelerator, lambda: self._write(line))
            self.meter = Meter(seconds)
        stopped = interrupted or terminated or late
        if stopped or self.done % config.save_every == 0 or self.done == config.steps:
            on_main(self.accelerator, lambda: self._save(seconds))
            self.folder = checkpoint.folder(self.out, self.done)
        stopped_by = signal.SIGINT if interrupted else signal.SIGTERM if terminated else None
        return taken.metrics, late, stopped_by

    def _write(self, line: dict[str, Any]) -> None:
        append_line(self.out / "metrics.jsonl", line)
        self.trackers.tell(line)

    def _flags(self, began: float, signals: LateSignals) -> list[float]:
        limit = math.inf if self.config.max_minutes is None else 60 * self.config.max_minutes
        over = time.monotonic() - began > limit
        return [float(signals.received == signal.SIGINT), float(signals.received == signal.SIGTERM), float(over)]

    def _save(self, seconds: float) -> None:
        scaler = self.accelerator.scaler
        state = {
            **self.identity,
            "seconds": seconds,
            "interval": asdict(self.meter),
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "versions": {
                "quickmerge": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "accelerate": accelerate.__version__,
            },
        }
        stepper = self.stepper
        optimizer = optimizer_tensors(stepper.adamw, stepper.parameters)
        made = checkpoint.Checkpoint(self.done, model_tensors(stepper.objective), optimizer, state)
        checkpoint.save(self.out, made)

    def _load(self, found: checkpoint.Checkpoint) -> None:
        check_same(self.out, found.state, self.identity)
        self.folder = checkpoint.folder(self.out, found.step)
        stepper = self.stepper
        load_model(stepper.objective, found.model, str(self.folder / checkpoint.MODEL))
        load_optimizer(stepper.adamw, stepper.parameters, found.optimizer, str(self.folder / checkpoint.OPTIMIZER))
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(found.state["loss_scale"])
        self.done = found.step
        self.before = found.state["seconds"]
        self.meter = Meter(**found.state["interval"])

    def _leave(self, number: int) -> None:
        if self.accelerator.is_main_process:
            say(f"stopped after step {self.done} of {self.config.steps}: resume to go on from {self.folder}")
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
