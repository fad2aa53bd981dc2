"""One linear map from the donor's space to the base's, fitted on the shared tokens.

Both maps take the means out first: row = m_b + (t - m_d) W, with m_d and m_b the means of the shared tokens in the two
spaces. They are solved in float64. A target of zeros, which nobody trained, becomes the mean of the shared rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quickmerge.errors import number_at_least
from quickmerge.vocabulary.spaces import aligned, at_least_float32, without_vector

__all__ = ["LeastSquares", "Procrustes"]


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
