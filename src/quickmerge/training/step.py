"""The learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    GradientAccumulationPlugin,
    broadcast,
    send_to_device,
)
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError
from quickmerge.training.checkpoint import trained_parameters
from quickmerge.training.config import TrainingConfig
from quickmerge.training.metrics import NAMES, Stream, seed_generators
from quickmerge.training.objective import Dataset, Objective
from quickmerge.training.sharding import asked_sharding, shard, whole_models

__all__ = ["Step", "Stepper", "learning_rate", "on_main", "share_buffers", "start", "total"]


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of one step, a pure function, so that no scheduler has a state to save.

    The rate rises evenly over the warm-up steps and has its full height in the last of them. From there ``linear``
    and ``cosine`` go down to ``final`` times the height, which the last step has.

    Args:
        step: counted from 0.
        config: the settings; `steps` does not matter when the schedule is constant.
    """
    if step < config.warmup:
        return config.learning_rate * ((step + 1) / config.warmup)
    if config.schedule == "constant":
        return config.learning_rate
    first = max(config.warmup - 1, 0)
    way = min((step - first) / max(config.steps - 1 - first, 1), 1.0)
    height = 1 - way if config.schedule == "linear" else (1 + math.cos(math.pi * way)) / 2
    return config.learning_rate * (config.final + (1 - config.final) * height)


# One process or several: accelerate, and how several of them agree.


def start(
    precision: str, uses_every_parameter: bool, log_with: list[str] | None = None, out: Path | None = None
) -> Accelerator:
    """Join the other processes, if `accelerate launch` or `torchrun` started some.

    Every process holds all that is trained (DDP): it fits one device, and a checkpoint must be the same whatever it was
    trained on. Frozen base models may be sharded, see `quickmerge.training.sharding`.

    Args:
        precision: as in `TrainingConfig`.
        uses_every_parameter: of the objective.
        log_with: names of the trackers that shall be told; they are installed.
        out: folder of the run, in which those that write files do that.

    Raises:
        QuickmergeError: the launcher asks for another sharding than FSDP2, or the device can't do the precision.
    """
    asked_sharding()
    # accelerate keeps the precision of the first run in a process, and refuses any other.
    AcceleratorState._reset_state()
    with whole_models():
        accelerator = Accelerator(
            mixed_precision=precision,
            log_with=log_with,
            project_dir=None if log_with is None or out is None else str(out / "trackers"),
            # Explicitly one: the loop accumulates itself, whatever the launcher's environment says.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=not uses_every_parameter)],
        )
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_"):
        raise QuickmergeError(f"training runs on one device or on several by DDP, got {kind.value}")
    if precision == "fp16" and accelerator.scaler is None:
        raise QuickmergeError(f"precision must be no or bf16 on the device {accelerator.device.type}, got fp16")
    return accelerator


def total(accelerator: Accelerator, values: Tensor) -> list[float]:
    """Sum the values of all processes, place by place; all processes get the same."""
    summed: Tensor = accelerator.reduce(values, "sum") if accelerator.num_processes > 1 else values
    numbers: list[float] = summed.tolist()
    return numbers


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Do something in the main process only, while the others wait; if it fails there, all processes raise.

    Raises:
        QuickmergeError: in the other processes, when the main one raised its own error.
    """
    failure: Exception | None = None
    if accelerator.is_main_process:
        try:
            action()
        except Exception as error:
            failure = error
    flag = torch.tensor([float(failure is not None)], device=accelerator.device)
    if total(accelerator, flag)[0]:
        raise failure or QuickmergeError("the main process failed, and tells why")


def share_buffers(accelerator: Accelerator, module: nn.Module) -> None:
    """Give all processes the main one's buffers, which are those that a checkpoint holds.

    DDP does so only in some of the next forwards; a resumed run would differ from one that went on.
    """
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            broadcast(buffer)


# One optimizer step.


SMALLEST_SCALE = 2.0**-14
"""An fp16 loss scale below this says that the gradient does not overflow by its scale: it is broken."""

NAMED_ITEMS = 16
"""How many items an error message names."""


@dataclass(frozen=True)
class Step:
    """What a step measured.

    Args:
        metrics: the objective's, means over the items of all processes, and ``grad_norm`` before clipping.
        rate: its learning rate, before groups of parameters have theirs.
        flags: what the processes answered to `ask` of `Stepper.take`, summed.
    """

    metrics: dict[str, float]
    rate: float
    flags: list[float]


class Stepper:
    """Takes steps. The objective itself is never wrapped: its weights and its forward stay its own.

    Args:
        objective: moved to the accelerator's device.
        dataset: the items.
        config: the settings.
        collate: makes a batch of a list of items.
        accelerator: of `quickmerge.training.step.start`.
    """

    def __init__(
        self,
        objective: Objective,
        dataset: Dataset,
        config: TrainingConfig,
        collate: Callable[[list[Any]], Any],
        accelerator: Accelerator,
    ) -> None:
        self.objective = objective
        self.dataset = dataset
        self.config = config
        self.collate = collate
        self.accelerator = accelerator
        self.stream = Stream(len(dataset), config.seed)
        sharding = asked_sharding()
        if sharding is not None:
            shard(objective.frozen(), accelerator, sharding)
            objective.sharded = accelerator.num_processes > 1
        objective.place(accelerator.device)
        # accelerate patches the forward of what it prepares: let that be a shell around the objective.
        with whole_models():
            self.shell = accelerator.prepare(_Shell(objective))
        self.parameters = trained_parameters(objective)
        groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
        for name, value in self.parameters.items():
            groups.setdefault((objective.group_of(name), value.ndim > 1), []).append(value)
        self.adamw = torch.optim.AdamW(
            [
                {"params": values, "weight_decay": config.weight_decay if matrices else 0.0, "group": group}
                for (group, matrices), values in groups.items()
            ],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        with whole_models():
            self.optimizer = accelerator.prepare(self.adamw)

    def take(self, step: int, ask: Callable[[], Sequence[float]] = tuple) -> Step:
        """Compute the gradient over the step's items of all processes, and apply it.

        Args:
            step: counted from 0.
            ask: asked once the gradient is there, for numbers to sum over the processes on the occasion.

        Raises:
            QuickmergeError: in all processes, when the loss or the gradient is not finite; nothing is applied then.
        """
        rate = learning_rate(step, self.config)
        for group in self.adamw.param_groups:
            group["lr"] = rate * self.objective.rate_of(group["group"], step / self.config.steps)
        metrics, losses = self._gradient(step)
        # Without a limit too this measures the norm, and under fp16 takes the loss scale out.
        limit = math.inf if self.config.clip is None else self.config.clip
        norm = float(self.accelerator.clip_grad_norm_(self.parameters.values(), limit))
        bad, flags, means = self._sum(ask(), metrics, losses)
        self._check_finite(step, bad, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        share_buffers(self.accelerator, self.objective)
        return Step({**means, "grad_norm": norm}, rate, flags)

    def micro_steps(self, step: int, rank: int) -> list[list[int]]:
        """The indices of a process's items in a step, by micro-step."""
        sizes = {"batch": self.config.batch, "accumulate": self.config.accumulate}
        return self.stream.micro_steps(step, processes=self.accelerator.num_processes, rank=rank, **sizes)

    def _gradient(self, step: int) -> tuple[dict[str, Tensor], Tensor]:
        """Accumulate the mean gradient. Returns this process's mean metrics and its ``(accumulate,)`` losses."""
        config, accelerator = self.config, self.accelerator
        rank = accelerator.process_index
        measured: list[dict[str, Tensor]] = []
        for number, indices in enumerate(self.micro_steps(step, rank)):
            # Before the items are read, so that a dataset may be random too.
            seed_generators(config.seed, step, number, rank)
            batch = send_to_device(self.collate([self.dataset[index] for index in indices]), accelerator.device)
            last = number == config.accumulate - 1
            with nullcontext() if last else accelerator.no_sync(self.shell):
                metrics = self.shell(batch, step / config.steps)
                _check_metrics(metrics)
                accelerator.backward(metrics["loss"] / config.accumulate)
            measured.append({name: value.detach().float().reshape(()) for name, value in metrics.items()})
        names = sorted(measured[0], key=lambda name: (name != "loss", name))
        means = {name: torch.stack([one[name] for one in measured]).mean() for name in names}
        return means, torch.stack([one["loss"] for one in measured])

    def _sum(
        self, flags: Sequence[float], metrics: Mapping[str, Tensor], losses: Tensor
    ) -> tuple[list[bool], list[float], dict[str, float]]:
        """Exchange everything that processes tell each other in a step, at once."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        bad = torch.zeros(processes, len(losses), device=losses.device)
        bad[rank] = (~losses.isfinite()).float()
        parts = [bad.flatten(), torch.tensor(flags, device=losses.device, dtype=bad.dtype), *metrics.values()]
        numbers = total(self.accelerator, torch.cat([part.reshape(-1) for part in parts]))
        first, second = bad.numel(), bad.numel() + len(flags)
        means = {name: number / processes for name, number in zip(metrics, numbers[second:], strict=True)}
        return [number > 0 for number in numbers[:first]], numbers[first:second], means

    def _check_finite(self, step: int, bad: Sequence[bool], norm: float) -> None:
        """Every process decides the same, from the same numbers."""
        broken = not math.isfinite(norm) and not self._only_scaled_too_high()
        if not any(bad) and not broken:
            return
        by_process = [self.micro_steps(step, rank) for rank in range(self.accelerator.num_processes)]
        parts = [part for parts in by_process for part in parts]
        if any(bad):
            parts = [part for part, one in zip(parts, bad, strict=True) if one]
        items = [index for part in parts for index in part]
        self.optimizer.zero_grad()
        describe = getattr(self.dataset, "describe", str)
        named = ", ".join(describe(index) for index in items[:NAMED_ITEMS])
        more = f" and {len(items) - NAMED_ITEMS} more" if len(items) > NAMED_ITEMS else ""
        what = "loss" if any(bad) else "gradient"
        raise QuickmergeError(
            f"the {what} is not finite (NaN or infinite) at step {step + 1}, on the items {named}{more}: "
            "the step was not taken, and the checkpoints before it are kept"
        )

    def _only_scaled_too_high(self) -> bool:
        """True when fp16 overflows by its loss scale: the scaler skips the step and halves the scale."""
        scaler = self.accelerator.scaler
        return scaler is not None and scaler.get_scale() > SMALLEST_SCALE


class _Shell(nn.Module):
    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Any, progress: float) -> dict[str, Tensor]:
        metrics: dict[str, Tensor] = self.objective(batch, progress)
        return metrics


def _check_metrics(metrics: object) -> None:
    if not isinstance(metrics, dict) or "loss" not in metrics:
        raise QuickmergeError(f"an objective must return a dict of tensors with 'loss' among them, got {metrics!r}")
    for name, value in metrics.items():
        if name in NAMES:
            raise QuickmergeError(f"an objective's metric must not be called {name!r}: the loop writes that itself")
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise QuickmergeError(f"an objective must return scalar tensors, got {value!r} for {name!r}")
