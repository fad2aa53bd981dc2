"""Attention: keep what the last tokens look at, drop the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.reducers.base import ScoreReducer, mean_attention
from quickmerge.tokens.saliency import received_attention
from quickmerge.tokens.view import TokenView


@dataclass(frozen=True)
class Attention(ScoreReducer):
    """Keep the tokens that receive most attention from the last ``window`` tokens; drop the rest.

    The selection that SnapKV (arXiv 2404.14469) makes for a cache, without its pooling, here in the residual
    stream: ``score_j = mean over probed layers and heads of r_hj``.

    Args:
        keep: share of the tokens kept, or a budget.
        layers: how many layers below the merge are probed.
        window: query rows that vote.
    """

    layers: int = 4
    window: int = 64
    name: ClassVar[str] = "attention"
    source: ClassVar[str] = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        super().__post_init__()
        whole_number("layers", self.layers)
        whole_number("window", self.window)

    @property
    def probes(self) -> int:  # noqa: D102
        return self.layers

    def voters(self, tokens: float) -> float:  # noqa: D102
        return min(float(self.window), tokens)

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        return mean_attention(view, partial(received_attention, window=self.window))
