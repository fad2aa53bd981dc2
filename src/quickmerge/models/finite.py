"""Weights that are numbers: what a damaged or hostile file may hold instead is found before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from quickmerge.errors import DamagedWeightsError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_finite"]


def check_finite(what: str, tensors: Iterable[tuple[str, Tensor]], remedy: str = "copy or download it again") -> None:
    """See that every floating point tensor holds finite numbers alone; those without values pass.

    One pass over the memory, nothing is copied, and a device is waited for once.

    Raises:
        DamagedWeightsError: naming the first that doesn't.
    """
    import torch

    names, ends = [], []
    for name, tensor in tensors:
        if not tensor.is_floating_point() or tensor.is_meta or not tensor.numel():
            continue
        numbers = tensor.detach()
        if numbers.element_size() == 1:  # 8-bit floats have no order in torch
            numbers = numbers.to(torch.bfloat16)
        least, most = torch.aminmax(numbers)  # NaN if there is one
        names.append(name)
        ends.append(torch.stack([least, most]).double().cpu() if numbers.device.type == "mps"
                    else torch.stack([least, most]).double())  # fmt: skip
    if not ends:
        return
    bad = torch.stack([end.to(ends[0].device) for end in ends]).isfinite().all(-1).logical_not()
    if bool(bad.any()):
        found = names[int(bad.nonzero()[0])]
        raise DamagedWeightsError(f"{what} is damaged: {found} holds values that are not finite: {remedy}")
