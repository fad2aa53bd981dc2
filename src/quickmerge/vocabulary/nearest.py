"""New tokens as means of the shared tokens that lie nearest to them in the donor's space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quickmerge.errors import QuickmergeError, near_match, whole_number
from quickmerge.vocabulary.omp import MEMORY
from quickmerge.vocabulary.spaces import aligned, at_least_float32, without_vector
from quickmerge.vocabulary.sparse import Sparse, combine

__all__ = ["Nearest"]


@dataclass(frozen=True)
class Nearest:
    """The k nearest shared tokens, weighted by how near they are; the weights sum to one.

        "softmax"            w_i ~ exp(temperature * cos(t, a_i))
        "inverse_distance"   w_i ~ 1 / distance(t, a_i), where distance is ||t - a_i|| or 1 - cos(t, a_i)

    A shared token at no distance gets all the weight. A target of zeros has no direction and becomes the mean of the
    shared rows. At a time as many targets are compared as fit into 512 MiB.

    Args:
        k: neighbours; with fewer shared tokens all of them.
        weights: "softmax" or "inverse_distance".
        temperature: of the softmax, larger is sharper.
        metric: "cosine" or "euclidean"; the softmax is of cosines.
        centre: whether the mean of the anchors is subtracted first, which spreads cosines out.

    Raises:
        QuickmergeError: for an unknown word, or a softmax of distances.
        ValueError: for a number out of range.
    """

    WEIGHTS: ClassVar[tuple[str, ...]] = ("softmax", "inverse_distance")
    METRICS: ClassVar[tuple[str, ...]] = ("cosine", "euclidean")

    k: int = 16
    weights: str = "softmax"
    temperature: float = 10.0
    metric: str = "cosine"
    centre: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number("k", self.k))
        for word, given, allowed in (("weights", self.weights, self.WEIGHTS), ("metric", self.metric, self.METRICS)):
            if given not in allowed:
                hint = near_match(str(given), allowed)
                raise QuickmergeError(f"{word} must be one of {', '.join(allowed)}, got {given!r}{hint}")
        if self.weights == "softmax" and self.metric != "cosine":
            raise QuickmergeError(f'metric must be "cosine" for weights="softmax", got {self.metric!r}')
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be a number above 0, got {self.temperature!r}")

    @property
    def name(self) -> str:
        """What tables call it."""
        how = f"softmax {self.temperature:g}" if self.weights == "softmax" else f"inverse {self.metric}"
        return f"nearest k={self.k} {how}" + (" centred" if self.centre else "")

    def coefficients(self, targets: Tensor, anchors: Tensor) -> Sparse:
        """The neighbours, nearest first, and their weights."""
        targets, anchors = aligned(targets, anchors)
        lost = without_vector(targets)
        if self.centre:
            middle = anchors.mean(0)
            targets, anchors = targets - middle, anchors - middle
        if self.metric == "cosine":
            targets, anchors = normalize(targets, dim=1), normalize(anchors, dim=1)
        k = min(self.k, len(anchors))
        squares = anchors.square().sum(1)
        step = max(1, MEMORY // (3 * len(anchors) * anchors.element_size()))
        indices, weights = [], []
        for part in torch.split(targets, step):
            nearness = part @ anchors.T
            if self.metric == "euclidean":
                nearness = nearness.sub_(squares / 2)  # -||t - a||^2 / 2 but for what is the same for all anchors
            index = nearness.topk(k, dim=1).indices
            indices.append(index)
            weights.append(self._weigh(part, anchors, index))
        found = Sparse(torch.cat(indices), torch.cat(weights)) if indices else _none(targets, k)
        return Sparse(found.indices.masked_fill(lost[:, None], -1), found.weights.masked_fill(lost[:, None], 0.0))

    def _weigh(self, targets: Tensor, anchors: Tensor, index: Tensor) -> Tensor:
        # Differences, one neighbour at a time: lengths and products would lose the digits of small distances.
        apart = torch.stack([(targets - anchors[column]).norm(dim=1) for column in index.T], dim=1)
        if self.metric == "cosine":
            apart = apart.square() / 2  # 1 - cos, of directions
        if self.weights == "softmax":
            return (-self.temperature * apart).softmax(dim=1)
        least = torch.finfo(apart.dtype).eps * anchors.norm(dim=1).max().clamp_min(torch.finfo(apart.dtype).tiny)
        hit = apart <= least
        near = torch.where(hit.any(1, keepdim=True), hit.to(apart.dtype), 1 / apart.clamp_min(least))
        return near / near.sum(1, keepdim=True)

    def combine(self, sparse: Sparse, rows: Tensor) -> Tensor:
        """The weighted means; the mean of all rows where a target has no neighbours."""
        rows = at_least_float32(rows)
        out = combine(sparse, rows)
        return torch.where((sparse.count == 0)[:, None], rows.mean(0), out)

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        return self.combine(self.coefficients(targets, anchors), rows)


def _none(targets: Tensor, k: int) -> Sparse:
    return Sparse(torch.empty(0, k, dtype=torch.long), targets.new_empty(0, k))
