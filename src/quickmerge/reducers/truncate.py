"""Truncate: the first tokens (attention sinks) and the most recent ones, StreamingLLM's choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.reducers.base import ScoreReducer
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class Truncate(ScoreReducer):
    """Keep the first ``sinks`` tokens and then the most recent ones (arXiv 2309.17453); drop the middle.

    Args:
        keep: share of the tokens kept, or a budget.
        sinks: tokens kept at the start, whatever is protected besides.
    """

    sinks: int = 4
    name: ClassVar[str] = "truncate"
    places: ClassVar[tuple[str, ...]] = ("text",)
    source: ClassVar[str] = "arXiv 2309.17453"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sinks", whole_number("sinks", self.sinks, 0))

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        recency = torch.where(view.valid, view.position, 0).to(torch.float64)
        return torch.where(view.position < self.sinks, 2 * recency.amax(-1, keepdim=True) + 1 - recency, recency)
