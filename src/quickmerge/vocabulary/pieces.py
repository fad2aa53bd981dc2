"""New tokens from the base tokens that their text is cut into: needs no donor vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.vocabulary.spaces import at_least_float32

__all__ = ["Subword", "cut"]

CHUNK = 65536
"""Pieces whose rows are gathered at a time."""


@dataclass(frozen=True)
class Subword:
    """A weighted mean of the rows of the pieces.

    Which one suits which matrix follows from what a row does. An input row stands for what has been read once the token
    is complete: the last piece knows most of that. An output row competes for being next: where the model would have
    begun the same text in pieces, the first piece's logit is what it gave, so "first", or "decay" with weights in
    the ratio 1, 1/2, 1/4, ... from the first piece on. "mean" is for either.

    A new row that is like its pieces' has nearly their logits, and so takes probability away from them wherever the
    base would go on in pieces. Pulled towards the mean of all rows, ``m + share (row - m)``, it takes less.

    Args:
        weights: "first", "last", "mean" or "decay".
        share: how much is left of the difference from the mean of the matrix, above 0 and at most 1.

    Raises:
        QuickmergeError: for another word, or another share.
    """

    WEIGHTS: ClassVar[tuple[str, ...]] = ("first", "last", "mean", "decay")

    weights: str = "mean"
    share: float = 1.0

    def __post_init__(self) -> None:
        number = isinstance(self.share, (int, float)) and not isinstance(self.share, bool)
        if not number or not 0 < self.share <= 1:
            raise QuickmergeError(f"share must be a number above 0 and at most 1, got {self.share!r}")
        if self.weights not in self.WEIGHTS:
            hint = near_match(str(self.weights), self.WEIGHTS)
            raise QuickmergeError(f"weights must be one of {', '.join(self.WEIGHTS)}, got {self.weights!r}{hint}")

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"subword {self.weights}" + (f" {self.share:g}" if self.share < 1 else "")

    def rebuild(self, pieces: Sequence[Sequence[int]], matrix: Tensor) -> Tensor:
        """Rows of T tokens.

        Args:
            pieces: for each token the base tokens that its text is cut into; a token of none becomes the mean of the
                matrix.
            matrix: ``(V, db)``, all rows of the base.

        Returns:
            ``(T, db)`` in float32 at least.

        Raises:
            QuickmergeError: for a piece that is no row of the matrix.
        """
        matrix = at_least_float32(matrix)
        length = torch.tensor([len(p) for p in pieces], dtype=torch.long)
        flat = torch.tensor([i for p in pieces for i in p], dtype=torch.long)
        wrong = flat[(flat < 0) | (flat >= len(matrix))]
        if len(wrong):
            raise QuickmergeError(f"pieces must be of the matrix's {len(matrix)} rows, got {int(wrong[0])}")
        token = torch.repeat_interleave(torch.arange(len(length)), length)
        place = torch.arange(len(flat)) - (length.cumsum(0) - length)[token]
        weight = self._weigh(place, length[token]).to(matrix.dtype)
        whole = matrix.new_zeros(len(length)).index_add_(0, token, weight)
        out = matrix.new_zeros(len(length), matrix.shape[1])
        for which, index, share in zip(*(torch.split(x, CHUNK) for x in (token, flat, weight)), strict=True):
            out.index_add_(0, which, matrix[index] * (share / whole[which])[:, None])
        middle = matrix.mean(0)
        out[length == 0] = middle
        return out if self.share == 1 else middle + self.share * (out - middle)

    def _weigh(self, place: Tensor, length: Tensor) -> Tensor:
        if self.weights == "first":
            return (place == 0).double()
        if self.weights == "last":
            return (place == length - 1).double()
        return torch.full_like(place, 0.5 if self.weights == "decay" else 1.0, dtype=torch.double) ** place


def cut(data: bytes, ids: Mapping[bytes, int], *, whole: bool = True) -> tuple[int, ...]:
    """The fewest base tokens whose bytes make up ``data``; of equally few those with the longest first piece.

    For a token that the base has, ``whole=False`` finds the pieces it would have without it: what a rule that
    looks at pieces must be judged by.

    Args:
        data: the bytes of a token.
        ids: base tokens by their bytes.
        whole: whether ``data`` itself counts as a piece.

    Returns:
        Base ids; none if there is no way.
    """
    # From every place on: how many pieces it takes to the end, and where the first of them ends.
    best: list[tuple[int, int] | None] = [None] * len(data) + [(0, len(data))]
    for start in range(len(data) - 1, -1, -1):
        for end in range(len(data), start, -1):
            rest = best[end]
            if rest is None or data[start:end] not in ids or (not whole and end - start == len(data)):
                continue
            found = best[start]
            if found is None or rest[0] + 1 < found[0]:
                best[start] = (rest[0] + 1, end)
    out, start = [], 0
    while start < len(data):
        step = best[start]
        if step is None:
            return ()
        out.append(ids[data[start : step[1]]])
        start = step[1]
    return tuple(out)
