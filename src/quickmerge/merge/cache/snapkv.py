"""SnapKV: what the last tokens of the prompt attend to, pooled over neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.merge.cache.evictor import Evictor, Heads, group_mean
from quickmerge.merge.cache.view import CacheView
from quickmerge.merge.tokens.saliency import AttentionTrace, attention_norm, lift, pool, received_attention

POOLS = ("mean", "max")


@dataclass(frozen=True)
class SnapKV(Evictor):
    """Keep what the observation window at the end of the prompt attends to (arXiv 2404.14469).

    ``s_j = pool_k mean_{i in last w} p_ij``, averaged over the query heads of a key head; the window itself stays.

    Args:
        window: w, the last tokens, whose attention votes.
        kernel: tokens over which scores are pooled; odd.
        pooling: ``"mean"`` or ``"max"``.
    """

    window: int = 64
    kernel: int = 5
    pooling: str = "mean"
    name: ClassVar[str] = "snapkv"
    source: ClassVar[str] = "arXiv 2404.14469"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", whole_number("window", self.window))
        object.__setattr__(self, "kernel", odd("kernel", self.kernel))
        if self.pooling not in POOLS:
            hint = near_match(str(self.pooling), POOLS)
            raise QuickmergeError(f"pooling must be one of {', '.join(POOLS)}, got {self.pooling!r:.80}{hint}")

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """Queries of the window times keys."""
        return sum(2 * min(self.window, n) * n for n in tokens) * shape.heads * shape.head_dim

    def least(self, valid: Tensor) -> Tensor:
        """The window stays."""
        return torch.full((len(valid),), self.window, device=valid.device)

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        received = received_attention(trace_of(view), view.valid, view.position, self.window)
        outside = view.valid & (view.valid.sum(-1, keepdim=True) - view.rank >= self.window)
        return pool_heads(group_mean(received, view.groups), outside, self.kernel, self.pooling)


SPANS = ("auto", "line", "word", "none")


@dataclass(frozen=True)
class AttentionNorm(Evictor):
    """Keep what adds most to the outputs of the last tokens, by whole lines: the measure of QuickMerge++, per key head.

    ``s_j = max_{j'' in span(j)} pool_k mean_h sqrt(mean_{i in last w} [i - j >= nearest] ||p_hij v_hj||^2)`` over the
    query heads of a key head (arXiv 2508.13204; see `quickmerge.merge.tokens.saliency.attention_norm`). An answer of
    which one token is gone is not recalled, so that a line or sentence stays as a whole or not at all, as in
    `quickmerge.QuickMerge`.

    Args:
        window: w, the last tokens, whose attention votes: few, since they are the question.
        nearest: votes count for tokens at least this far before the voter, but at most an eighth of the row, or of
            the window of a layer that has one.
        kernel: tokens over which scores are pooled; odd.
        spans: ``"line"``, ``"word"`` or ``"none"``; ``"auto"``: lines, where a tokenizer tells the text of the tokens.
    """

    recency: float = 0.5
    window: int = 16
    nearest: int = 64
    kernel: int = 15
    spans: str = "auto"
    name: ClassVar[str] = "norm"
    source: ClassVar[str] = "arXiv 2508.13204"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", whole_number("window", self.window))
        object.__setattr__(self, "nearest", whole_number("nearest", self.nearest, 0))
        object.__setattr__(self, "kernel", odd("kernel", self.kernel))
        if self.spans not in SPANS:
            hint = near_match(str(self.spans), SPANS)
            raise QuickmergeError(f"spans must be one of {', '.join(SPANS)}, got {self.spans!r:.80}{hint}")

    @property
    def unit(self) -> str | None:
        """See `Evictor.unit`."""
        return None if self.spans == "none" else self.spans

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """Queries of the window times keys."""
        return sum(2 * min(self.window, n) * n for n in tokens) * shape.heads * shape.head_dim

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        reach = view.valid.sum(-1) if view.window is None else view.valid.sum(-1).clamp_max(view.window)
        nearest = (reach // 8).clamp_max(self.nearest)
        norm = attention_norm(trace_of(view), view.valid, view.position, self.window, nearest=nearest)
        pooled = pool_heads(group_mean(norm, view.groups), view.valid, self.kernel)
        if self.unit is None or view.group is None:
            return pooled
        return each_head(pooled, lambda flat, valid, group: lift(flat, group, valid), view.valid, view.group)


def odd(name: str, value: int) -> int:
    """A whole number that is odd.

    Raises:
        ValueError: it is none.
    """
    number = whole_number(name, value)
    if number % 2 == 0:
        raise QuickmergeError(f"{name} must be odd, got {value}")
    return number


def trace_of(view: CacheView) -> AttentionTrace:
    """The layer as an `AttentionTrace`, with the bias of its keys in one channel more."""
    if view.bias is None:
        return AttentionTrace(view.query, view.key, view.value, view.scaling, view.window)
    query = torch.cat([view.query, torch.ones_like(view.query[..., :1])], -1)
    bias = (view.bias / view.scaling).to(view.key.dtype)[:, None, :, None].expand(*view.key.shape[:3], 1)
    return AttentionTrace(query, torch.cat([view.key, bias], -1), view.value, view.scaling, view.window)


def pool_heads(scores: Tensor, valid: Tensor, width: int, kind: str = "mean") -> Tensor:
    """`quickmerge.merge.tokens.saliency.pool` for ``(B, G, n)``; ``valid (B, n)`` is that of all heads."""
    return each_head(scores, lambda flat, there: pool(flat, there, width, kind), valid)


def each_head(scores: Tensor, change: Callable[..., Tensor], *tables: Tensor) -> Tensor:
    """``(B, G, n)`` scores that ``change`` makes of ``(B G, n)``, given tables ``(B, n)`` of the rows beside them."""
    g = scores.shape[1]
    return change(scores.flatten(0, 1), *(table.repeat_interleave(g, 0) for table in tables)).view(scores.shape)


__all__ = ["AttentionNorm", "SnapKV", "odd", "pool_heads", "trace_of"]
