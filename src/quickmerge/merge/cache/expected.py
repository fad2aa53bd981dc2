"""ExpectedAttention: what queries that are yet to come will attend to, if they are like those so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, whole_number
from quickmerge.merge.cache.evictor import Evictor, Heads, group_mean
from quickmerge.merge.cache.view import CacheView


@dataclass(frozen=True)
class ExpectedAttention(Evictor):
    """Keep what future queries are expected to attend to (arXiv 2510.00636).

    Queries before their rotary embedding are taken for normal, with the mean and covariance that they had over the
    prompt. Turned by the mean rotation over the ``future`` next positions, they are ``N(m, C)``, and a key's expected
    weight is ``z_j = exp(m k_j s + k_j' C k_j s^2 / 2)`` with the factor s on the scores. Then ``s_j = (z_j / sum_i z_i
    + epsilon) ||v_j||``, averaged over the query heads of a key head.

    Args:
        future: positions behind the prompt for which queries are expected.
        covariance: whether C counts, or the mean alone.
        epsilon: weight that every entry has beside what is expected, of at least 0; where it is far above a mean
            weight, ``1 / n``, values alone decide.
    """

    future: int = 512
    covariance: bool = True
    epsilon: float = 0.0005
    name: ClassVar[str] = "expected"
    source: ClassVar[str] = "arXiv 2510.00636"
    unrotates: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "future", whole_number("future", self.future))
        if not isinstance(self.covariance, bool):
            raise QuickmergeError(f"covariance must be True or False, got {self.covariance!r:.80}")
        number = isinstance(self.epsilon, (int, float)) and not isinstance(self.epsilon, bool)
        if not number or not 0 <= self.epsilon < float("inf"):
            raise QuickmergeError(f"epsilon must be a number of at least 0, got {self.epsilon!r:.80}")

    def flops(self, shape: Heads, tokens: Sequence[float]) -> float:
        """The covariance of the queries, and the quadratic form of each key with it."""
        return 2 * (2 if self.covariance else 0) * sum(tokens) * shape.heads * shape.head_dim**2

    def scores(self, view: CacheView) -> Tensor:  # noqa: D102
        assert view.rotary is not None
        rotary = view.rotary()
        dtype = torch.promote_types(view.query.dtype, torch.float32)
        query = rotary.unrotate(view.query.to(dtype), view.position)
        # The sinks' queries are like no others.
        told = view.valid & ((view.rank > self.sinks) | (view.valid.sum(-1, keepdim=True) <= self.sinks))
        there = told[:, None, :, None]
        total = there.sum(2, keepdim=True).to(dtype)
        mean = torch.where(there, query, 0.0).sum(2, keepdim=True) / total
        ends = torch.where(view.valid, view.position, -1).amax(-1)
        turn = rotary.mean_turn(ends[:, None] + torch.arange(1, self.future + 1, device=ends.device), query.shape[-1])
        turn = turn.to(dtype)[:, None]
        g, scale = view.groups, view.scaling
        key = view.key.to(dtype).repeat_interleave(query.shape[1] // g, 1)
        logit = (key @ (mean @ turn.transpose(-1, -2)).transpose(-1, -2)).squeeze(-1) * scale
        if self.covariance:
            apart = torch.where(there, query - mean, 0.0)
            spread = turn @ (apart.transpose(-1, -2) @ apart / total) @ turn.transpose(-1, -2)
            logit = logit + ((key @ spread) * key).sum(-1) * scale**2 / 2
        if view.bias is not None:
            logit = logit + view.bias[:, None].to(dtype)
        expected = logit.masked_fill(~view.valid[:, None], -torch.inf).softmax(-1)
        norm: Tensor = torch.linalg.vector_norm(view.value.to(dtype), dim=-1)
        return group_mean(expected + self.epsilon, g) * norm
