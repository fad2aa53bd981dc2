"""TrimTokenator: drop visual tokens far from the question, then keep those that are unlike one another."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.merge.reducers.base import Needs, Reducer
from quickmerge.merge.tokens.budget import fixed_count, known_count, round_half_up
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.tokens.selection import OBJECTIVES, disperse, keep_only, keeps_everything, most_chosen, unit
from quickmerge.merge.tokens.view import TokenView


@dataclass(frozen=True)
class TrimTokenator(Reducer):
    """Two-stage pruning of visual tokens (arXiv 2509.00320): near the text first, then far from one another.

    **A reconstruction.** The authors published no code that we know of, and we had their abstract, not the equations.
    That there are two stages, that the first is a norm of differences between visual and text embeddings, and that the
    second greedily maximises the expected pairwise distance, is theirs; the rest is our reading:

    1. Of the free tokens, the share ``aligned`` stays that is nearest to the text,
       ``-(1/M) sum_m ||v_i - e_m||^2``, at least as many as the budget wants. The paper's share is not known.
    2. Of these, the first kept is the one of the least mean cosine with all, and each next one has the least sum of
       cosines with those kept (`quickmerge.merge.tokens.selection.disperse`), up to the budget.

    What is kept stays in its order and what is not is dropped. For the visual tokens that a language model is given,
    behind the projector, with the model's own embeddings of the question as text: both in one space. Inside a
    plain vision transformer, or over the frames of a video, there is no question: ``aligned=1`` leaves the first stage
    out.

    Where visual tokens are much longer than those of the text, the first stage sees little but their own length and
    keeps the short ones; ``normalize`` compares directions instead.

    Args:
        keep: share of the tokens kept, or a budget that needs no saliency.
        aligned: share of the free tokens that the first stage leaves, in (0, 1]; at 1 no text is needed.
        normalize: give visual and text tokens length 1 in the first stage.
        norm: 2 for squared Euclidean distances, 1 for sums of absolute differences.
        objective: ``"sum"``, or ``"min"`` to keep next the token whose nearest kept one is farthest (max-min).
    """

    aligned: float = 0.8
    normalize: bool = False
    norm: int = 2
    objective: str = "sum"
    name: ClassVar[str] = "trimtokenator"
    source: ClassVar[str] = "arXiv 2509.00320"
    places: ClassVar[tuple[str, ...]] = ("vision",)
    once: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        number = isinstance(self.aligned, (int, float)) and not isinstance(self.aligned, bool)
        if not (number and 0 < self.aligned <= 1):
            raise ValueError(f"aligned must be a number in (0, 1], got {self.aligned!r}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize must be True or False, got {self.normalize!r}")
        if isinstance(self.norm, bool) or self.norm not in (1, 2):
            raise ValueError(f"norm must be 1 or 2, got {self.norm!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")

    @property
    def needs(self) -> Needs:  # noqa: D102
        return Needs(visual=frozenset({"text"} if self.aligned < 1 else ()))

    def alignment(self, view: TokenView) -> Tensor:
        """``(B, N)``: minus the mean distance to the text, as `alignment` says; higher is nearer.

        Raises:
            ValueError: if the view has no text, or one of another width than the tokens.
        """
        if view.evidence.text is None:
            raise ValueError(
                f"text must be (B, M, D) embeddings of the question for {self.name}, got none; with aligned=1, none is "
                "needed"
            )
        if view.evidence.text.shape[-1] != view.hidden.shape[-1]:
            raise ValueError(
                f"text must have as many features as the tokens, {view.hidden.shape[-1]}, "
                f"got {view.evidence.text.shape[-1]}"
            )
        x = torch.where(view.valid[..., None], view.hidden, 0.0)
        return alignment(x, view.evidence.text, view.evidence.text_valid, self.normalize, self.norm)

    def plan(self, view: TokenView) -> MergePlan:  # noqa: D102
        left, p = fixed_count(self.budget, view), view.prefix
        if left is not None and p is not None:
            patches = view.hidden.shape[1] - p
            stage1 = max(left - p, math.floor(self.aligned * patches + 0.5 + 1e-9))
            near = None if stage1 >= patches else self._nearest(view, stage1)[:, p:]
            return keep_only(view, disperse(view.hidden[:, p:], left - p, near, self.objective), left)
        count, kept = self.budget.count(view, None), known_count(self.budget, view)
        if keeps_everything(view, count, kept):
            return MergePlan.identity(view)
        wanted = count - (view.protected & view.valid).sum(-1)
        stage1s = torch.maximum(wanted, round_half_up(self.aligned * view.free.sum(-1).double()))
        near = view.free if self.aligned == 1 else self._nearest(view, stage1s[:, None])
        return keep_only(view, disperse(view.hidden, wanted, near, self.objective, most_chosen(view, kept)), kept=kept)

    def _nearest(self, view: TokenView, count: int | Tensor) -> Tensor:
        """``(B, N)`` bool: the ``count`` (or ``(B, 1)``) free tokens nearest to the text, of equal ones the earlier."""
        score = self.alignment(view)
        # Squares that overflow are far away, but must not count as padding.
        score = score.nan_to_num(nan=(least := torch.finfo(score.dtype).min), neginf=least)
        score = torch.where(view.free, score, -torch.inf)
        order = score.argsort(dim=-1, descending=True, stable=True)
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        return torch.zeros_like(view.valid).scatter(1, order, place < count)


def alignment(
    x: Tensor, text: Tensor, text_valid: Tensor | None = None, normalize: bool = False, norm: int = 2
) -> Tensor:
    """Minus the mean distance of each token to those of the text, without gradients: ``(B, N)``, float32 at least.

    ``-(1/M) sum_m ||x_i - e_m||^2 = 2 x_i . mean_m e_m - ||x_i||^2 - mean_m ||e_m||^2``, so that M does not matter to
    the cost; with ``norm=1`` all pairs are compared, ``-(1/M) sum_m |x_i - e_m|_1``.

    Args:
        x: ``(B, N, D)`` visual tokens.
        text: ``(B, M, D)`` text tokens.
        text_valid: ``(B, M)`` bool, False for padding. Default: all.
        normalize: give all tokens length 1 first; an all-zero one stays zero.
        norm: 1 or 2.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, text.dtype), torch.float32)
    x, text = x.detach().to(dtype), text.detach().to(dtype)
    there = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if text_valid is None else text_valid
    text = torch.where(there[..., None], text, 0.0)
    if normalize:
        x, text = unit(x), unit(text)
    number = there.sum(-1, keepdim=True).clamp_min(1)
    if norm == 1:
        return -(torch.cdist(x, text, p=1.0) * there[:, None]).sum(-1) / number
    mean = text.sum(1) / number
    lengths = text.square().sum((1, 2))[:, None] / number
    return 2 * (x @ mean[..., None])[..., 0] - x.square().sum(-1) - lengths
