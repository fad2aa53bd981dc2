"""Telling one model from another by its weights, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from quickmerge.errors import QuickmergeError

SAMPLE = 256
"""Values of each parameter that enter the hash, at equal distances."""

_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple[int, bytes], str]] = WeakKeyDictionary()


def model_hash(model: nn.Module) -> str:
    """A hash of a model's parameters: names, shapes and 256 values of each, as bfloat16.

    The same for float32 and bfloat16 copies of the same weights (a float16 copy has other values). Any training
    step changes it. It is computed once for each state of a model.
    """
    state = _state(model)
    if model in _KNOWN and _KNOWN[model][0] == state:
        return _KNOWN[model][1]
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().flatten()
        if flat.numel():
            step = max(1, flat.numel() // SAMPLE)
            values = flat[::step][:SAMPLE].to(torch.bfloat16).cpu()
            digest.update(values.view(torch.int16).numpy().tobytes())
    found = digest.hexdigest()
    _KNOWN[model] = (state, found)
    return found


def _state(model: nn.Module) -> tuple[int, bytes]:
    """What tells whether a model may have changed: its parameters' versions, and one value of each.

    Versions alone don't: a fused optimizer changes weights without counting them up.
    """
    probes = [p.detach().flatten()[p.numel() // 2].float() for p in model.parameters() if p.numel()]
    # All together, since a GPU would be waited for with each.
    values = torch.stack([p.to(probes[0].device) for p in probes]).cpu().numpy().tobytes() if probes else b""
    return sum(parameter._version for parameter in model.parameters()), values


def check_model(model: Any, trained_for: dict[str, Any], what: str) -> None:
    """Raise QuickmergeError unless ``model`` is the one that ``trained_for`` names by its hash."""
    given = model_hash(model)
    wanted = trained_for.get("hash")
    if given != wanted:
        name = trained_for.get("model", "another model")
        raise QuickmergeError(
            f"{what} was trained for {name} (weights {str(wanted)[:12]}), got a {type(model).__name__} with other "
            f"weights ({given[:12]}): load that model, in float32 or bfloat16, or train a prior for this one"
        )
