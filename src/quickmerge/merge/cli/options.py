"""Options that name a reducer: how much it keeps, and the prior that it is given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.console.options import check_keep, one_sentence
from quickmerge.errors import QuickmergeError

if TYPE_CHECKING:
    from quickmerge.merge.reducers import Reducer
    from quickmerge.merge.tokens.budget import Budget


def parse_budget(keep: float | None, tokens: int | None, usual: float) -> float | Budget:
    """``--keep`` or ``--tokens``, whichever was given, else the ``usual`` share."""
    from quickmerge.merge.tokens.budget import Count

    if tokens is None:
        return usual if keep is None else keep
    if keep is not None:
        raise QuickmergeError(f"give either --keep or --tokens, got {keep:g} and {tokens}")
    return Count(tokens)


def parse_reducer(name: str, keep: float | Budget, place: str = "text") -> Reducer:
    """A reducer by its name, of those for language models, vision transformers (``place="vision"``) or both."""
    from quickmerge.merge.reducers import make_reducer

    if isinstance(keep, (int, float)):
        check_keep(keep)
    with one_sentence():
        return make_reducer(name, place=place, keep=keep)


def add_prior(method: Reducer, prior: str) -> Reducer:
    """QuickMerge with a trained prior, which is given as a folder or by the name of a shipped one.

    Settings that were given with the reducer's name stay; the others are those that the prior was trained with.
    """
    from dataclasses import fields

    from quickmerge.data import shipped_prior
    from quickmerge.merge.prior import Prior, QuickMergePrior
    from quickmerge.merge.reducers import QuickMerge

    if type(method) is not QuickMerge:
        raise QuickmergeError(f"--prior belongs to the reducer quickmerge, got {method.name}")
    given = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    trained = Prior.from_pretrained(shipped_prior(prior) or Path(prior))
    with one_sentence():
        return QuickMergePrior.from_prior(trained, **{"keep": method.keep, **given})
