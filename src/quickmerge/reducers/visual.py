"""Choosing visual tokens as a pure function of tensors, for engines that serve models in their own way."""

from __future__ import annotations

import torch
from torch import Tensor

from quickmerge.reducers.base import Reducer
from quickmerge.tokens.budget import Count, Ratio
from quickmerge.tokens.plan import MergePlan, anchors_of
from quickmerge.tokens.view import TokenView


@torch.no_grad()
def select_visual_tokens(
    features: Tensor,
    reducer: Reducer,
    *,
    saliency: Tensor | None = None,
    key: Tensor | None = None,
    text: Tensor | None = None,
    text_valid: Tensor | None = None,
    grid: tuple[int, int, int] | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, MergePlan]:
    """Which visual tokens of some pictures are kept, a picture a row; no model is looked at.

    How many are kept is known beforehand, ``min(K, n)`` of the n tokens of a row, so an engine can make room for them.

    Args:
        features: ``(B, N, D)`` what is compared: of the vision tower for SCOPE, of the projector for TrimTokenator.
        reducer: with a share or a `Count` for ``keep``.
        saliency: ``(B, N)`` how much attention each token receives, for SCOPE, Attention and QuickMergeVision.
        key: ``(B, N, d)`` keys, mean over heads, for ToMe, ToFu and QuickMergeVision.
        text: ``(B, M, D)`` embeddings of the question, for TrimTokenator.
        text_valid: ``(B, M)`` bool, False for padding.
        grid: ``(T, H, W)`` of the tokens, for Pool.
        valid: ``(B, N)`` bool, False for padding.

    Returns:
        ``(B, N)`` bool, the tokens that are kept, or that others merge into; and the plan, whose ``merge`` makes them.

    Raises:
        ValueError: for a method that is not for visual tokens, a budget that looks at the tokens, or where the method
            needs something that was not given.
    """
    if not isinstance(reducer, Reducer) or "vision" not in reducer.places:
        raise ValueError(f"reducer must be one for visual tokens, such as SCOPE(keep=0.25), got {reducer!r}")
    if not isinstance(reducer.budget, (Count, Ratio)):
        raise ValueError(f"keep must be a share or a Count, which are known beforehand, got {reducer.keep!r}")
    given = {"grid": grid, "text": text, "text_valid": text_valid, "saliency": saliency, "key": key}
    view = TokenView(features, valid=valid, layer=0, depth=1, **given)  # type: ignore[arg-type]
    plan = reducer.plan(view)
    kept = torch.zeros(*features.shape[:2], dtype=torch.bool, device=features.device)
    rows = torch.arange(kept.shape[0], device=kept.device)[:, None].expand_as(plan.position)
    kept[rows[plan.valid], anchors_of(plan, view)[plan.valid]] = True
    return kept, plan
