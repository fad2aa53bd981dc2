"""What quantised models are: whose weights no longer lie in parameters, and whose tokens are no longer read alone.

Quantisation is told by what modules and parameters are, never by a name in a configuration: the same library may pack
weights, round activations, or do neither (a GGUF file is read into plain floating point weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from quickmerge.errors import QuickmergeError, first_sentence

__all__ = ["int8_packer", "pack_int8", "packed", "reads_together"]

_PACKED = (torch.int8, torch.uint8, torch.int32)
"""Dtypes that packed weights are held in."""


def packed(model: nn.Module) -> str | None:
    """A weight of a model that is not held as plain floating point numbers, in words; None if there is none."""
    return next(_packed(model), None)


def _packed(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        values = parameter.data
        sharded = type(values).__module__.startswith("torch.distributed")
        if not values.is_floating_point():
            yield f"{name} as {str(values.dtype).removeprefix('torch.')}"
        elif is_traceable_wrapper_subclass(values) and not sharded:
            yield f"{name} as {type(values).__name__}"
    for name, module in model.named_modules():
        where = f"{name} as {type(module).__name__}"
        if callable(getattr(module, "weight", None)):  # it unpacks what it holds, as torch's own int8 layers do
            yield where
        kept = {key: each for key, each in module._buffers.items() if key not in module._non_persistent_buffers_set}
        if any(each is not None and each.ndim > 1 and each.dtype in _PACKED for each in kept.values()):
            yield where


def reads_together(model: nn.Module) -> str | None:
    """Why what a model says of a token depends on the other tokens of the same call, in words; None if it does not.

    It is so where one range of activations is taken for a whole call, or outliers are looked for in all of it. Rounding
    aside a model in floating point reads each token by itself, and so does one that takes a range for each token.
    """
    for name, module in model.named_modules():
        kind = f"{name} is a {type(module).__module__.removeprefix('torch.')}.{type(module).__name__}"
        if ".quantized.dynamic" in type(module).__module__:
            return f"{kind}, which takes one range for the activations of all tokens that are read in a call"
        if (threshold := getattr(getattr(module, "state", None), "threshold", None)) and hasattr(module, "weight"):
            return f"{kind}, which looks for outliers (threshold {threshold}) in all tokens that are read in a call"
        asked = getattr(getattr(module, "weight", None), "act_quant_kwargs", None)
        if asked is not None and _whole(asked):
            return f"{kind} whose weight takes one range for the activations of all tokens that are read in a call"
    return None


def _whole(settings: Any) -> bool:
    """Whether settings of activations ask for one range for a whole tensor."""
    return type(getattr(settings, "granularity", None)).__name__ == "PerTensor"


def int8_packer() -> Any:
    """Torchao's module that packs weights.

    Raises:
        QuickmergeError: it is not installed, or does not go with the torch that is.
    """
    try:
        import torchao.quantization as ao
    except ImportError as error:
        raise QuickmergeError(
            f"dtype 'int8' needs torchao ({first_sentence(error)}): pip install 'quickmerge[int8]', or name another one"
        ) from error
    return ao


def pack_int8(model: nn.Module) -> None:
    """Hold the weights of every linear layer of a model in eight bits, each row by a range of its own, in place.

    Activations stay what they are, so that a token is read alone as beside others. Embeddings stay too: an output
    matrix that was tied to them is one of its own afterwards. It saves memory and no time: torchao turns the weights
    back into the model's dtype for every product, unless the model is compiled.
    """
    ao = int8_packer()
    # without a change of the settings of torch.compile, which are the whole process's
    ao.quantize_(model, ao.Int8WeightOnlyConfig(set_inductor_config=False))
