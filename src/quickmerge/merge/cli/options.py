"""Options that name a reducer: how much it keeps, and the prior that it is given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge.console.options import check_keep, one_sentence
from quickmerge.errors import QuickmergeError

if TYPE_CHECKING:
    from quickmerge.merge.cache import Evictor
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


def parse_method(name: str, keep: float) -> Reducer | Evictor:
    """A reducer for language models, or a method for their cache, by its name."""
    from quickmerge.errors import near_match
    from quickmerge.merge.cache import EVICTORS, make_evictor
    from quickmerge.merge.reducers import REDUCERS

    first = name.partition(":")[0]
    if first in EVICTORS:
        with one_sentence():
            check_keep(keep)
            return make_evictor(name, keep=keep, min_tokens=0)
    if first not in REDUCERS:
        known = [*REDUCERS, *EVICTORS]
        raise QuickmergeError(f"--reducer must be one of {', '.join(known)}, got {first!r}{near_match(first, known)}")
    return parse_reducer(name, keep)


def parse_cache(given: str | None) -> Evictor | None:
    """``--cache``: a share, or a method with settings."""
    from quickmerge.merge.cache import as_evictor

    if given is None:
        return None
    try:
        share: float | str = float(given)
    except ValueError:
        share = given
    with one_sentence():
        return as_evictor(share)


def add_prior(method: Reducer, prior: str) -> Reducer:
    """QuickMerge with a trained prior, which is given as a folder, as a hub id or by the name of a shipped one.

    Settings that were given with the reducer's name stay; the others are those that the prior was trained with.
    """
    from dataclasses import fields

    from quickmerge.data import shipped_prior
    from quickmerge.merge.prior import Prior, QuickMergePrior
    from quickmerge.merge.reducers import QuickMerge

    if type(method) is not QuickMerge:
        raise QuickmergeError(f"--prior belongs to the reducer quickmerge, got {method.name}")
    given = {f.name: getattr(method, f.name) for f in fields(method) if getattr(method, f.name) != f.default}
    trained = Prior.from_pretrained(shipped_prior(prior) or prior)
    with one_sentence():
        return QuickMergePrior.from_prior(trained, **{"keep": method.keep, **given})
