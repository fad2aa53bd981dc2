"""The tensors of a checkpoint: what was trained, and AdamW's state of it, by the parameters' names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError

__all__ = ["load_model", "load_optimizer", "model_tensors", "optimizer_tensors", "trained_parameters"]

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
