"""Attention: keep what the last tokens look at, drop the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import whole_number
from quickmerge.merge.reducers.base import Needs, ScoreReducer, key_bias, mean_attention, sees_all, voters
from quickmerge.merge.tokens.saliency import AttentionTrace, bidirectional_attention, received_attention
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class Attention(ScoreReducer):
    """Keep the tokens that receive most attention from the last ``window`` tokens; drop the rest.

    The selection that SnapKV (arXiv 2404.14469) makes for a cache, without its pooling, here in the residual
    stream: ``score_j = mean over probed layers and heads of r_hj``.

    In a vision transformer the prefix tokens vote instead, as for EViT (arXiv 2202.07800), and all tokens where there
    is no prefix; a view's own ``saliency`` is taken as it is.

    Args:
        keep: share of the tokens kept, or a budget.
        layers: how many layers below the merge are probed.
        window: query rows that vote; of no account in a vision transformer.
    """

    layers: int = 4
    window: int = 64
    name: ClassVar[str] = "attention"
    source: ClassVar[str] = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "layers", whole_number("layers", self.layers))
        object.__setattr__(self, "window", whole_number("window", self.window))

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(self.layers, self.window, frozenset({"attention"}))

    def score(self, view: TokenView) -> Tensor:  # noqa: D102
        if view.evidence.saliency is not None:
            return torch.where(view.valid, view.evidence.saliency, 0.0)
        if not sees_all(view):
            return mean_attention(view, partial(received_attention, window=self.window))
        tokens = view.hidden.shape[1]
        if view.prefix is not None:
            rows = voters(view, 0 if view.prefix else tokens)
        else:
            rows = voters(view, torch.where((view.protected & view.valid).any(-1), 0, tokens))
        bias = key_bias(view, self.proportional)

        def received(trace: AttentionTrace, valid: Tensor, position: Tensor) -> Tensor:
            return bidirectional_attention(trace, rows, bias)

        return mean_attention(view, received)
