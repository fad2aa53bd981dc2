"""Checking how a model is asked to be loaded, before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.models.compat import attention_names

if TYPE_CHECKING:
    import torch

__all__ = ["check_attention", "check_device", "check_dtype"]

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Give the torch dtype that is meant.

    Raises:
        QuickmergeError: it is not one that weights can be held in.
    """
    import torch

    name = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise QuickmergeError(f"dtype is {name!r}{near_match(name, DTYPES)}, but must be one of: {', '.join(DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved


def check_device(device: str | torch.device) -> torch.device:
    """Give the torch device that is meant.

    Raises:
        QuickmergeError: the words name no device, or this machine has none such.
    """
    import torch

    try:
        placement = torch.device(device)
        torch.empty(0, device=placement)  # a name can be right and the device still absent
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            allowed.append("mps")
        raise QuickmergeError(
            f"device is {str(device)!r}, which this machine does not have; it has: {', '.join(allowed)}"
        ) from error
    return placement


def check_attention(name: str) -> str:
    """Give back the name of an attention implementation that transformers knows.

    Raises:
        QuickmergeError: it knows none of this name.
    """
    known = attention_names()
    # a name with a slash is a kernel on the hub, which only transformers can look up
    if name not in known and "/" not in name:
        usual = [word for word in known if "paged" not in word]
        raise QuickmergeError(
            f"attn_implementation is {name!r}{near_match(name, known)}, but must be one of: {', '.join(usual)}"
        )
    return name
