"""Parameters that a loss does not depend on, kept in its graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["nothing_of"]


def nothing_of(module: nn.Module) -> Tensor:
    """A scalar zero that every trained parameter of a module has its part in, with a gradient of zeros.

    Where processes train together (DDP) each waits for the gradient of every parameter, whatever its own batch holds.
    """
    trained = [value for value in module.parameters() if value.requires_grad]
    # The sum of nothing is zero whatever the values are, while 0 times a value need not be.
    return torch.stack([value.flatten()[:0].float().sum() for value in trained]).sum() if trained else torch.zeros(())
