"""One process or several: accelerate, and how several of them agree."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs  # type: ignore[import-untyped]
from accelerate.state import AcceleratorState  # type: ignore[import-untyped]
from accelerate.utils import (  # type: ignore[import-untyped]
    DistributedType,
    GradientAccumulationPlugin,
    broadcast,
)
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError

__all__ = ["on_main", "share_buffers", "start", "total"]

SHARDING = {"FSDP": "FSDP", "DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a mesh"}


def start(precision: str, uses_every_parameter: bool) -> Accelerator:
    """Join the other processes, if `accelerate launch` or `torchrun` started some.

    Every process holds the whole model (DDP). Sharding it is refused: what is trained here fits one device, and
    a checkpoint must be the same whatever it was trained on.

    Raises:
        QuickmergeError: the launcher asks for FSDP or another sharding, or the device can't do the precision.
    """
    for name, words in SHARDING.items():
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes"):
            raise QuickmergeError(f"training shards no model, and the launcher asks for {words}: launch it without")
    # accelerate keeps the precision of the first run in a process, and refuses any other.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=precision,
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
