"""The methods by name: which rules each of them lets compete."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError, near_match, whole_number

if TYPE_CHECKING:
    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.rules import Rule

__all__ = ["METHODS", "NEEDS_VECTORS", "check_method", "rules_of"]

METHODS = {
    "auto": "for each kind of token what a text costs the fewest bits with, of the best of all rules",
    "omp": "orthogonal matching pursuit, centred; k chosen on held-out tokens unless it is given",
    "omp-raw": "orthogonal matching pursuit as published, k 64: not centred, no correction of the mean",
    "nearest": "the nearest shared tokens of the donor; how many and how weighted is chosen on held-out tokens",
    "least-squares": "one linear map from the donor's vectors to the base's",
    "procrustes": "one rotation between the principal axes of both",
    "subword-first": "the base's row of the first of a token's pieces",
    "subword-last": "the base's row of the last piece",
    "subword-mean": "the mean of the pieces' rows",
    "subword-decay": "the pieces' rows with weights that halve from piece to piece",
    "subword-pulled": "three quarters of the way from the mean of all rows to the mean of the pieces' rows",
    "mean": "the mean of the shared rows",
    "zero": "zeros",
}
"""Their names, and what each does."""
NEEDS_VECTORS = ("omp", "omp-raw", "nearest", "least-squares", "procrustes")
RAW_K = 64
PULLED = 0.75


def check_method(method: str, k: int | None, *, vectors: bool) -> None:
    """See that a method can be used as asked.

    Raises:
        QuickmergeError: there is none of this name, it takes no k, or it needs vectors and there are none.
    """
    if method not in METHODS:
        raise QuickmergeError(
            f"method is {method!r}{near_match(method, METHODS)}, but must be one of: {', '.join(METHODS)}"
        )
    if k is not None:
        try:
            k = whole_number("k", k)
        except ValueError as error:
            raise QuickmergeError(str(error)) from None
        if method not in ("auto", "omp", "omp-raw", "nearest"):
            raise QuickmergeError(f"k belongs to auto, omp, omp-raw and nearest, got k={k} with {method}")
    if method in NEEDS_VECTORS and not vectors:
        free = [name for name in METHODS if name not in NEEDS_VECTORS]
        raise QuickmergeError(
            f"method {method} needs vectors of the new tokens: give donor, or text to make vectors from, "
            f"or one of: {', '.join(free)}"
        )


def rules_of(method: str, *, k: int | None, anchors: int, vectors: bool) -> list[Rule | Subword]:
    """The rules that a method lets compete for one matrix, the simpler ones first.

    Args:
        method: one of ``METHODS``.
        k: how many shared tokens a row is made of; None for the usual ones.
        anchors: how many shared tokens there are to make rows of, the held-out ones not counted.
        vectors: whether the donor has vectors.

    Raises:
        QuickmergeError: there are fewer anchors than ``k``.
    """
    from quickmerge.vocabulary.pieces import Subword
    from quickmerge.vocabulary.rules import LeastSquares, Mean, Nearest, Omp, Procrustes, Zero
    from quickmerge.vocabulary.select import candidates

    if k is not None and vectors and k > anchors:
        raise QuickmergeError(f"k must be at most {anchors}, the shared tokens that rows can be made of, got {k}")
    if method == "subword-pulled":
        return [Subword("mean", PULLED)]
    if method.startswith("subword-"):
        return [Subword(method.removeprefix("subword-"))]
    if method == "omp-raw":
        return [Omp(k or min(RAW_K, anchors), centre=False, selection="inner", correct_mean=False)]
    every = candidates(pieces=True, most=anchors)
    if k is not None:
        wide = {_with_k(rule, k): None for rule in every}  # some differ in nothing but k
        every = list(wide)
    if method == "auto":
        return [rule for rule in every if vectors or isinstance(rule, (Zero, Mean, Subword))]
    kind = {
        "omp": Omp, "nearest": Nearest, "least-squares": LeastSquares, "procrustes": Procrustes, "mean": Mean,
        "zero": Zero,
    }[method]  # fmt: skip
    found = [rule for rule in every if isinstance(rule, kind)]
    if not found:  # fewer anchors than the smallest of the usual ks
        raise QuickmergeError(
            f"method {method} needs more shared tokens to make rows of than {anchors}: give a smaller k"
        )
    return found


def _with_k(rule: Rule | Subword, k: int) -> Rule | Subword:
    from quickmerge.vocabulary.rules import Nearest, Omp

    return replace(rule, k=k) if isinstance(rule, (Omp, Nearest)) else rule
