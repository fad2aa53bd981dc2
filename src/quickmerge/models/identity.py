"""Telling one model from another by its weights, whatever they are called and wherever they lie.

Hashes carry the number of their rule in front, ``"2:..."``. Those without one are of the first rule, which looked at
256 values of each parameter: files that hold one are still checked by it.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import align_module_device, has_offloaded_params  # type: ignore[import-untyped]
from torch import Tensor, nn

from quickmerge.errors import QuickmergeError
from quickmerge.models.quantized import packed

RULE = "2"
"""The rule of the hashes that are made now."""

SAMPLE = 256
"""Values of each parameter that enter a hash of the first rule, at equal distances."""

PIECE = 2**22
"""Values that are brought to bfloat16 and to the CPU at once, so that a hash takes little memory beside the model."""

WORKERS = 8
"""Parameters that are hashed at the same time, at most."""

_KNOWN: WeakKeyDictionary[nn.Module, tuple[tuple[int, bytes], dict[str, str]]] = WeakKeyDictionary()


def model_hash(model: nn.Module) -> str:
    """A hash of a model's parameters: names, shapes and all values, as bfloat16; as ``"2:<64 hexadecimal digits>"``.

    The same for float32 and bfloat16 copies of the same weights (a float16 copy has other values), on any device. Two
    models have the same one only if all their weights are the same in bfloat16. It is computed once for each state of a
    model; 135 million weights take about half a second.

    Raises:
        QuickmergeError: if parameters hold no values, on the meta device, or weights are quantised: what is packed
            beside the parameters would not be looked at.
    """
    return _hash(model, RULE)


def hash_like(model: nn.Module, given: object) -> str:
    """The hash of ``model`` by the rule that the hash ``given`` was made by, to compare the two.

    Raises:
        QuickmergeError: if ``given`` was made by a rule that is not known here, or parameters hold no values or
            are quantised.
    """
    rule, colon, _ = str(given).partition(":")
    if colon and rule != RULE:
        raise QuickmergeError(
            f"hash must be of rule 1 or {RULE}, got {str(given)[:16]!r}: it was made by a newer version of quickmerge"
        )
    return _hash(model, rule if colon else "1")


def check_model(model: Any, trained_for: dict[str, Any], what: str) -> None:
    """Raise QuickmergeError unless ``model`` is the one that ``trained_for`` names by its hash."""
    wanted = trained_for.get("hash")
    given = model_hash(model) if wanted is None else hash_like(model, wanted)
    if given != wanted:
        name = trained_for.get("model", "another model")
        raise QuickmergeError(
            f"{what} was trained for {name} (weights {str(wanted)[:12]}), got a {type(model).__name__} with other "
            f"weights ({given[:12]}): load that model, in float32 or bfloat16, or train a prior for this one"
        )


def _hash(model: nn.Module, rule: str) -> str:
    aside = _aside(model) if rule == RULE else {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta and name not in aside:
            raise QuickmergeError(
                f"model must hold its weights to be told from others, got {name} on the meta device: load the model "
                "without offloading to disk"
            )
    if (held := packed(model)) is not None:
        raise QuickmergeError(
            f"model must hold its weights as floating point numbers to be told from others, got {held}: load the model "
            "in float32 or bfloat16, without quantisation"
        )
    if aside:  # whether they have changed since nobody knows without reading them, so nothing is remembered
        return f"{RULE}:{_whole(model, aside)}"
    state = _state(model)
    if model not in _KNOWN or _KNOWN[model][0] != state:
        _KNOWN[model] = (state, {})
    found = _KNOWN[model][1]
    if rule not in found:
        found[rule] = _sampled(model) if rule == "1" else f"{RULE}:{_whole(model)}"
    return found[rule]


def _aside(model: nn.Module) -> dict[str, bytes]:
    """The SHA-256 of all values of each parameter that accelerate has put aside, on a disk or in memory, by name."""
    found: dict[str, bytes] = {}
    for place, module in model.named_modules():
        names = [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
        if not names or not has_offloaded_params(module):
            continue
        with align_module_device(module, torch.device("cpu")):
            for name, parameter in module.named_parameters(recurse=False):
                if name in names and not parameter.is_meta:
                    found[f"{place}.{name}" if place else name] = _digest(parameter.detach())
    return found


def _whole(model: nn.Module, aside: dict[str, bytes] | None = None) -> str:
    """The second rule: SHA-256 over names, shapes, and the SHA-256 of all values of each parameter."""
    named, known = sorted(model.named_parameters()), aside or {}
    # Hashing lets other threads run meanwhile.
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(lambda each: known[each[0]] if each[0] in known else _digest(each[1].detach()), named))
    digest = hashlib.sha256()
    for (name, parameter), values in zip(named, digests, strict=True):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        digest.update(values)
    return digest.hexdigest()


def _digest(values: Tensor) -> bytes:
    digest = hashlib.sha256()
    for piece in torch.split(values.reshape(-1), PIECE):
        digest.update(_bytes(piece))
    return digest.digest()


def _sampled(model: nn.Module) -> str:
    """The first rule: SHA-256 over names, shapes and a few values of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.detach().flatten()
        if flat.numel():
            digest.update(_bytes(flat[:: max(1, flat.numel() // SAMPLE)][:SAMPLE]))
    return digest.hexdigest()


def _bytes(values: Tensor) -> bytes:
    return values.to(torch.bfloat16).cpu().contiguous().view(torch.int16).numpy().tobytes()


def _state(model: nn.Module) -> tuple[int, bytes]:
    """What tells whether a model may have changed: its parameters' versions, and the sum of all their bits.

    Versions alone don't: a fused optimizer changes weights without counting them up, perhaps a few rows of a table.
    """
    parameters = list(model.parameters())
    sums = [part for parameter in parameters for part in _sums(parameter.detach())]
    # All together, since a GPU would be waited for with each.
    devices: dict[torch.device, list[Tensor]] = {}
    for part in sums:
        devices.setdefault(part.device, []).append(part)
    values = b"".join(torch.stack(parts).cpu().numpy().tobytes() for parts in devices.values())
    return sum(parameter._version for parameter in parameters), values


def _sums(values: Tensor) -> list[Tensor]:
    """Sums of a tensor's bytes, taken as whole numbers of eight bytes as far as these go, and the rest one by one."""
    flat = values.reshape(-1)
    whole = flat.numel() * flat.element_size() // 8 * 8 // flat.element_size()
    # Numbers of eight bytes must begin at a multiple of eight bytes.
    aligned = flat.storage_offset() * flat.element_size() % 8 == 0
    parts = [(flat if aligned else flat.clone())[:whole].view(torch.int64).sum()] if whole else []
    if whole < flat.numel():
        parts.append(flat[whole:].clone().view(torch.uint8).sum())
    return parts
