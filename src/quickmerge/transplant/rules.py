"""What all rules ask of the vectors that they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from quickmerge.errors import QuickmergeError, near_match, number_at_least, whole_number
from quickmerge.transplant.matching_pursuit import MEMORY, SELECTIONS, Sparse, combine, omp

__all__ = [
    "LeastSquares",
    "Mean",
    "Nearest",
    "Omp",
    "Procrustes",
    "Rule",
    "SparseRule",
    "Zero",
    "aligned",
    "at_least_float32",
    "without_vector",
]


def at_least_float32(x: Tensor) -> Tensor:
    """The same numbers in float32, or in float64 if they were."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def aligned(targets: Tensor, anchors: Tensor, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Targets and anchors in one precision, float32 at least.

    Args:
        targets: ``(T, dd)``.
        anchors: ``(N, dd)``, N at least 1.
        rows: ``(N, db)``.

    Raises:
        QuickmergeError: if the shapes don't fit.
    """
    if targets.ndim != 2 or anchors.ndim != 2 or targets.shape[1] != anchors.shape[1]:
        shapes = f"{tuple(targets.shape)} and {tuple(anchors.shape)}"
        raise QuickmergeError(f"targets and anchors must be (T, d) and (N, d) with the same d, got {shapes}")
    if not len(anchors):
        raise QuickmergeError("anchors must hold at least one shared token, got none")
    if rows is not None and (rows.ndim != 2 or len(rows) != len(anchors)):
        raise QuickmergeError(f"rows must be ({len(anchors)}, d), one for each anchor, got {tuple(rows.shape)}")
    dtype = torch.promote_types(torch.promote_types(targets.dtype, anchors.dtype), torch.float32)
    return targets.detach().to(dtype), anchors.detach().to(dtype)


def without_vector(x: Tensor) -> Tensor:
    """``(T,)`` bool: rows of zeros, which stand for tokens that were never trained."""
    return ~x.any(dim=1)


# New tokens as means of the shared tokens that lie nearest to them in the donor's space.


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


# One linear map from the donor's space to the base's, fitted on the shared tokens.
#
# Both maps take the means out first: row = m_b + (t - m_d) W, with m_d and m_b the means of the shared tokens in the
# two spaces. They are solved in float64. A target of zeros, which nobody trained, becomes the mean of the shared rows.


@dataclass(frozen=True)
class LeastSquares:
    """The W of least ||X W - Y||^2 + ridge * s ||W||^2, with X, Y the centred anchors and rows.

    s is the mean of the eigenvalues of X^T X, so a ridge means the same for few tokens and many, short vectors and long
    ones. Without a ridge, W is the one of least length where the tokens don't determine it.

    Args:
        ridge: at least 0.

    Raises:
        ValueError: for a ridge out of range.
    """

    ridge: float = 0.1

    def __post_init__(self) -> None:
        number_at_least("ridge", self.ridge, 0)

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"least squares ridge={self.ridge:g}"

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        moved, x, y, middle = _centred(targets, anchors, rows)
        values, axes = _axes(x, anchors)
        # Along axes that are not there, W is zero.
        inverse = 1 / (values + self.ridge * values.sum() / x.shape[1])
        out: Tensor = middle + moved @ ((axes * inverse) @ (axes.T @ (x.T @ y)))
        return out.to(at_least_float32(rows).dtype)


@dataclass(frozen=True)
class Procrustes:
    """A rotation, and one scale, between the principal axes of the two spaces.

    With X, Y the centred anchors and rows, V_d and V_b their first p principal axes and p the smaller of their ranks:
    P = X V_d and Q = Y V_b, R orthogonal and s of least ||s P R - Q||^2. So U S Z^T = P^T Q gives R = U Z^T and
    s = sum(S) / ||P||^2 (Schonemann 1966), and W = s V_d R V_b^T.
    """

    name: str = "procrustes"

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        moved, x, y, middle = _centred(targets, anchors, rows)
        axes_d, axes_b = _axes(x, anchors)[1], _axes(y, rows)[1]
        p = min(axes_d.shape[1], axes_b.shape[1])
        if p == 0:
            return middle.repeat(len(targets), 1).to(at_least_float32(rows).dtype)
        axes_d, axes_b = axes_d[:, :p], axes_b[:, :p]
        flat = x @ axes_d
        u, s, zt = torch.linalg.svd(flat.T @ (y @ axes_b))
        out: Tensor = middle + moved @ (axes_d @ ((s.sum() / flat.square().sum()) * (u @ zt)) @ axes_b.T)
        return out.to(at_least_float32(rows).dtype)


def _centred(targets: Tensor, anchors: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets and anchors less the anchors' mean, rows less theirs, and that; all in float64."""
    aligned(targets, anchors, rows)
    x, y = anchors.detach().double(), rows.detach().double()
    moved = (targets.detach().double() - x.mean(0)).masked_fill_(without_vector(targets)[:, None], 0.0)
    middle = y.mean(0)
    return moved, x - x.mean(0), y - middle, middle


def _axes(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``(r,)`` of X^T X and principal axes ``(d, r)``, the longest first; only those that X really has.

    ``raw`` is X before its mean was taken out, which leaves roundings of it.
    """
    values, axes = torch.linalg.eigh(x.T @ x)
    unit = torch.finfo(x.dtype).eps
    floor = max(unit * max(x.shape) * float(values.amax()), (4 * unit) ** 2 * float(raw.double().square().sum()))
    kept: Tensor = axes[:, values > floor]
    return values[values > floor].flip(0), kept.flip(1)


# Rules that rebuild a base row for a token that only the donor has: one interface for all that look at donor vectors.
#
# A rule sees the new tokens in the donor's space, ``targets (T, dd)``, and the shared tokens in both spaces, row by
# row: ``anchors (N, dd)`` in the donor's, ``rows (N, db)`` in the base's. Input and output matrices are rebuilt apart,
# each with its own vectors.


class Rule(Protocol):
    """How to rebuild base rows from donor vectors."""

    @property
    def name(self) -> str:
        """What tables call it: short, different for different settings."""
        ...

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """``(T, db)`` base rows, in float32 at least, for ``targets (T, dd)``."""
        ...


@runtime_checkable
class SparseRule(Protocol):
    """A rule whose rows are weighted sums of few shared rows."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        ...

    def coefficients(self, targets: Tensor, anchors: Tensor) -> Sparse:
        """Which shared tokens, and how much of each: from the donor's space alone."""
        ...

    def combine(self, sparse: Sparse, rows: Tensor) -> Tensor:
        """``(T, db)`` rows from such coefficients and ``rows (N, db)``."""
        ...


@dataclass(frozen=True)
class Omp:
    """Orthogonal matching pursuit in the donor's space, the same weights in the base's (arXiv 2506.06607).

        t ~ m_d + sum_i w_i (a_i - m_d)        row = m_b + sum_i w_i (b_i - m_b) = sum_i w_i b_i + (1 - sum_i w_i) m_b

    with m the means of the shared tokens. Raw weights don't sum to one, so a row without the second term carries too
    little of what all base rows have in common, and its logit is off by (sum_i w_i - 1) h·m_b at every position.

    Args:
        k: most shared tokens for each new one; with fewer shared ones all of them may be used.
        centre: whether to subtract the mean in the donor's space.
        selection: see `omp`.
        correct_mean: whether to add the second term. ``Omp(k, centre=False, selection="inner", correct_mean=False)``
            is the paper's rule.

    Raises:
        QuickmergeError: for an unknown selection.
        ValueError: for a k that is no whole number of at least 1.
    """

    k: int = 64
    centre: bool = True
    selection: str = "unit"
    correct_mean: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "k", whole_number("k", self.k))
        if self.selection not in SELECTIONS:
            hint = near_match(str(self.selection), SELECTIONS)
            raise QuickmergeError(f"selection must be one of {', '.join(SELECTIONS)}, got {self.selection!r}{hint}")

    @property
    def name(self) -> str:
        """What tables call it."""
        words = [f"omp k={self.k}", self.selection, "" if self.centre else "uncentred"]
        return " ".join(w for w in [*words, "" if self.correct_mean else "uncorrected"] if w)

    def spaces(self, targets: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Targets and atoms as the pursuit sees them, centred or not; tokens that nobody trained stay zeros."""
        targets, anchors = aligned(targets, anchors)
        lost, idle = without_vector(targets)[:, None], without_vector(anchors)[:, None]
        if self.centre:
            middle = anchors.sum(0) / (~idle).sum().clamp_min(1)
            targets, anchors = targets - middle, anchors - middle
        return targets.masked_fill(lost, 0.0), anchors.masked_fill(idle, 0.0)

    def coefficients(self, targets: Tensor, anchors: Tensor) -> Sparse:
        """As `SparseRule.coefficients`; a target of zeros, which nobody trained, gets none."""
        x, atoms = self.spaces(targets, anchors)
        return omp(x, atoms, min(self.k, len(atoms)), selection=self.selection)

    def combine(self, sparse: Sparse, rows: Tensor) -> Tensor:
        """As `SparseRule.combine`."""
        rows = at_least_float32(rows)
        out = combine(sparse, rows)
        if self.correct_mean:
            out.addcmul_(1 - sparse.total[:, None].to(out.dtype), rows.mean(0))
        return out

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        return self.combine(self.coefficients(targets, anchors), rows)


@dataclass(frozen=True)
class Mean:
    """The mean of the shared rows, for every new token: what any rule has to beat."""

    name: str = "mean"

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        rows = at_least_float32(rows)
        return rows.mean(0).repeat(len(targets), 1)


@dataclass(frozen=True)
class Zero:
    """Zeros, for every new token: leaves its logits at zero, which is no small number where the others' are below."""

    name: str = "zero"

    def rebuild(self, targets: Tensor, anchors: Tensor, rows: Tensor) -> Tensor:
        """As `Rule.rebuild`."""
        aligned(targets, anchors, rows)
        rows = at_least_float32(rows)
        return rows.new_zeros(len(targets), rows.shape[1])
