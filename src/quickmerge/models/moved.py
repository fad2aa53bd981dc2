"""What goes from the host to a device and back: all that is wanted at once, so that little is waited for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["onto", "read"]


def onto(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for it; the very same where it is there already."""
    return x.to(device, non_blocking=True)


def read(*given: Tensor | None) -> tuple[Tensor | None, ...]:
    """Tensors of whole numbers or of bools on the host, all of them by one wait; None for None.

    Where they are on the host already they are the very same.
    """
    away = [x for x in given if x is not None and x.device.type != "cpu"]
    if not away:
        return given
    if len(away) == 1:
        found = [away[0].cpu()]
    else:
        flat = torch.cat([x.reshape(-1).long() for x in away]).cpu()
        parts = torch.split(flat, [x.numel() for x in away])
        found = [part.view(x.shape).to(x.dtype) for part, x in zip(parts, away, strict=True)]
    there = iter(found)
    return tuple(x if x is None or x.device.type == "cpu" else next(there) for x in given)


def numbers(*given: Tensor) -> list[Sequence[int]]:
    """The same as lists of Python's numbers, each tensor flattened."""
    return [[] if x is None else x.reshape(-1).tolist() for x in read(*given)]
