"""Checkpoints: ``checkpoints/step-000123/`` with two safetensors files and a JSON file, nothing that could run code."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.files import write_folder, write_json
from quickmerge.models.folder import check_safetensors

__all__ = ["KEPT", "MODEL", "OPTIMIZER", "STATE", "Checkpoint", "folder", "folders", "load", "newest", "prune", "save"]

KEPT = 2
"""The older one is there for the case that the newer one is damaged."""

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
REMEDY = "delete its folder"


@dataclass(frozen=True)
class Checkpoint:
    """What a run needs to go on after `step` steps.

    Args:
        step: steps done.
        model: trained parameters and buffers.
        optimizer: AdamW's state.
        state: everything else, as JSON.
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]


def folder(out: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps of the output folder `out` is."""
    return out / "checkpoints" / f"step-{step:06d}"


def folders(out: Path) -> list[Path]:
    """The checkpoints' folders in the output folder `out`, from the oldest to the newest."""
    found = [path for path in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step)


def save(out: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint whole or not at all, then remove all but the last two.

    Raises:
        QuickmergeError: the disk is full or not writable. The checkpoints before are still there.
    """

    def fill(work: Path) -> None:
        save_file(dict(checkpoint.model), work / MODEL)
        save_file(dict(checkpoint.optimizer), work / OPTIMIZER)
        write_json(work / STATE, dict(checkpoint.state) | {"step": checkpoint.step})

    write_folder(folder(out, checkpoint.step), fill)
    prune(out, checkpoint.step)
    for path in folders(out):
        if _step(path) > checkpoint.step:  # a damaged one, which this run has gone back behind
            shutil.rmtree(path, ignore_errors=True)


def prune(out: Path, step: int) -> None:
    """Remove all checkpoints up to `step` but the last two."""
    for path in [path for path in folders(out) if _step(path) <= step][:-KEPT]:
        shutil.rmtree(path, ignore_errors=True)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DamagedWeightsError: a file is missing, cut off or garbled.
    """
    try:
        for name in (MODEL, OPTIMIZER):
            check_safetensors(path / name, REMEDY)
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        return Checkpoint(state["step"], load_file(path / MODEL), load_file(path / OPTIMIZER), state)
    except FileNotFoundError as error:
        raise DamagedWeightsError(f"{path} is damaged ({Path(error.filename).name} is missing): {REMEDY}") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, DamagedWeightsError):
            raise
        raise DamagedWeightsError(f"{path} is damaged ({error}): {REMEDY}") from error


def newest(out: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint in `out` that is whole, and a sentence on each newer one that is damaged.

    Returns:
        None instead of a checkpoint if there is no folder of one.

    Raises:
        QuickmergeError: there are some, and all are damaged.
    """
    damaged: list[str] = []
    for path in reversed(folders(out)):
        try:
            return load(path), damaged
        except DamagedWeightsError as error:
            damaged.append(str(error))
    if damaged:
        raise QuickmergeError(f"no checkpoint in {out / 'checkpoints'} is whole: {'; '.join(damaged)}")
    return None, []


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
