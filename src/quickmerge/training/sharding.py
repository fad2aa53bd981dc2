"""Frozen base models that don't fit one device: their blocks are spread over all processes, or over devices.

What is trained is small and stays whole in every process, as ever (DDP). A frozen base model is outside of it; where
the launcher asks for FSDP, the weights of its blocks are split among the processes (FSDP2), and each block's are put
together for as long as it computes. The values are the same ones, so that a run gives what it gives unsharded, bit for
bit, and a checkpoint knows nothing of it. Embeddings, norms and the output matrix stay whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.utils import FullyShardedDataParallelPlugin  # type: ignore[import-untyped]
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from quickmerge.errors import QuickmergeError

__all__ = ["Sharding", "asked_sharding", "is_spread", "place_frozen", "shard", "whole_models"]

FSDP = "ACCELERATE_USE_FSDP"
OTHERS = {"DEEPSPEED": "DeepSpeed", "MEGATRON_LM": "Megatron-LM", "PARALLELISM_CONFIG": "a mesh"}


@dataclass(frozen=True)
class Sharding:
    """How frozen blocks are sharded: whether their weights are let go after a forward (as accelerate's setting)."""

    reshard: bool = True


def asked_sharding() -> Sharding | None:
    """What the launcher asks for by its environment, as `accelerate launch --use_fsdp --fsdp_version 2` sets it.

    Raises:
        QuickmergeError: it asks for FSDP1, for offloading, or for another way of sharding.
    """
    for name, words in OTHERS.items():
        if _is_on(f"ACCELERATE_USE_{name}"):
            raise QuickmergeError(
                f"training shards frozen models by FSDP2 alone, and the launcher asks for {words}: launch it without"
            )
    if not _is_on(FSDP):
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise QuickmergeError(
            f"training shards frozen models by FSDP2, and the launcher asks for version {version}: launch it with "
            "--fsdp_version 2"
        )
    if _is_on("FSDP_OFFLOAD_PARAMS"):
        raise QuickmergeError("training offloads no parameters: launch it with --fsdp_offload_params false")
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    return Sharding(bool(plugin.reshard_after_forward))


@contextmanager
def whole_models() -> Iterator[None]:
    """Within the block accelerate is told nothing of FSDP: what it is given is trained, and stays whole."""
    held = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if held is not None:
            os.environ[FSDP] = held


def shard(frozen: Sequence[tuple[nn.Module, Sequence[nn.Module]]], accelerator: Accelerator, how: Sharding) -> None:
    """Split the blocks of frozen models among the processes, in place; with one process there is nothing to split.

    Each block's weights go to the training device one block after the other, so that a device never holds more than
    one of them whole. The rest of a model is left where it is.

    Args:
        frozen: models with their blocks, none of which requires a gradient.
        accelerator: of the run.
        how: see `Sharding`.

    Raises:
        QuickmergeError: there is no frozen model, or one is on several devices already.
    """
    if not frozen:
        raise QuickmergeError(
            "the launcher asks for FSDP, which shards a frozen base model, and this training has none: launch it "
            "without"
        )
    for model, _ in frozen:
        if is_spread(model):
            raise QuickmergeError("a model with a device_map can't be sharded by FSDP too: give one of the two")
    if accelerator.num_processes == 1:
        return
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    for _, blocks in frozen:
        for block in blocks:
            fully_shard(block, mesh=mesh, reshard_after_forward=how.reshard)


def is_spread(model: Any) -> bool:
    """Whether accelerate has put a model's parts on several devices, or aside, by a ``device_map``."""
    places = getattr(model, "hf_device_map", None)
    return isinstance(places, dict) and (len({str(each) for each in places.values()}) > 1 or "disk" in places.values())


def place_frozen(model: nn.Module, device: torch.device) -> None:
    """Move a frozen model to the training device; one that a ``device_map`` has spread stays where it is."""
    if not is_spread(model):
        model.to(device)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
