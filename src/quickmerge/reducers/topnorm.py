"""TopNorm: keep the tokens whose features are longest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.reducers.base import ScoreReducer
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class TopNorm(ScoreReducer):
    """Keep the tokens with the largest ``||x_i||`` in the residual stream and drop the rest."""

    name: ClassVar[str] = "topnorm"

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        x = view.hidden.to(torch.promote_types(view.hidden.dtype, torch.float32))
        norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
        return norm
