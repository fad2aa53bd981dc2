"""Cache layers of multipole attention with a few tokens in them."""

from __future__ import annotations

import torch
from attend_samples import generator
from torch import Tensor

from quickmerge.multipole import Multipole, MultipoleLayer
from quickmerge.multipole.upkeep import refresh

SETTINGS = Multipole(ratio=0.25, sink=2, interval=4, block=16)
H, D, DV = 2, 3, 5


def new(rows: int, tokens: int, draws: torch.Generator, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, H, tokens, D, generator=draws).to(dtype), torch.randn(
        rows, H, tokens, DV, generator=draws
    ).to(dtype)


def filled(tokens: int, rows: int = 2, seed: int = 0, settings: Multipole = SETTINGS) -> MultipoleLayer:
    """A layer with clusters, its last token a new one."""
    layer = MultipoleLayer()
    layer.update(*new(rows, tokens, generator(seed)))
    refresh(layer, 1, None, settings, layer.keys)
    return layer
