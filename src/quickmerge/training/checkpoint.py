"""The tensors of a checkpoint: what was trained, and AdamW's state of it, by the parameters' names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.files import write_folder, write_json
from quickmerge.models.folder import check_safetensors

__all__ = [
    "KEPT",
    "MODEL",
    "OPTIMIZER",
    "STATE",
    "Checkpoint",
    "folder",
    "folders",
    "load",
    "load_model",
    "load_optimizer",
    "model_tensors",
    "newest",
    "optimizer_tensors",
    "prune",
    "save",
    "trained_parameters",
]


MOMENTS = ("exp_avg", "exp_avg_sq")


def trained_parameters(objective: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require a gradient, by name; tied ones once."""
    return {name: value for name, value in objective.named_parameters() if value.requires_grad}


def model_tensors(objective: nn.Module) -> dict[str, Tensor]:
    """Copies on the CPU of the trained parameters and the persistent buffers."""
    return {name: _plain(value) for name, value in _live(objective).items()}


def load_model(objective: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Put tensors that `model_tensors` made back into the objective.

    Raises:
        QuickmergeError: a name is missing or unknown, or a shape or type differs. Nothing is changed then.
    """
    live = _live(objective)
    _check(live, tensors, where)
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(tensors[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """AdamW's ``step`` (scalar) and moments (a parameter's shape), named ``parameter.exp_avg`` and so on.

    A parameter that has had no gradient yet has none.
    """
    return {
        f"{name}.{key}": _plain(value)
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    where: str,
) -> None:
    """Put tensors that `optimizer_tensors` made back into the optimizer.

    Raises:
        QuickmergeError: a name is missing or unknown, or a shape or type differs. Nothing is changed then.
    """
    begun = {name: parameter for name, parameter in parameters.items() if f"{name}.step" in tensors}
    moments = {f"{name}.{key}": parameter for name, parameter in begun.items() for key in MOMENTS}
    steps = {f"{name}.step": torch.zeros((), dtype=torch.float32) for name in begun}
    _check({**moments, **steps}, tensors, where)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    index = {id(parameter): i for i, parameter in enumerate(grouped)}
    state = {
        index[id(parameter)]: {key: tensors[f"{name}.{key}"].clone() for key in ("step", *MOMENTS)}
        for name, parameter in begun.items()
    }
    # torch knows where each must be: AdamW counts steps on the CPU, but where it is fused on the parameter's device.
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _live(objective: nn.Module) -> dict[str, Tensor]:
    state = objective.state_dict(keep_vars=True)
    buffers = {name: v for name, v in state.items() if isinstance(v, Tensor) and not isinstance(v, nn.Parameter)}
    return {**trained_parameters(objective), **buffers}


def _plain(tensor: Tensor) -> Tensor:
    # A copy: safetensors refuses tensors that share memory, as tied buffers and views do.
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _check(expected: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    for name in sorted(expected.keys() | given.keys()):
        if name not in given:
            raise QuickmergeError(f"{where} does not fit the objective: it has no {name}")
        if name not in expected:
            raise QuickmergeError(f"{where} does not fit the objective: it holds {name}, which the objective has not")
        want, have = expected[name], given[name]
        if want.shape != have.shape or want.dtype != have.dtype:
            raise QuickmergeError(
                f"{where} does not fit the objective: {name} is {_kind(have)} there and {_kind(want)} in the objective"
            )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


# Checkpoints: ``checkpoints/step-000123/`` with two safetensors files and a JSON file, nothing that could run code.


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
