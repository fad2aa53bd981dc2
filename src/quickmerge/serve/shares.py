"""A recipe that keeps another share: what a request may change of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from quickmerge.errors import QuickmergeError, first_sentence
from quickmerge.merge.place import Merge
from quickmerge.recipe import Recipe
from quickmerge.recipe.ingredients import PLACES

__all__ = ["keeping"]


def keeping(recipe: Recipe, keep: float) -> Recipe:
    """The recipe with another share where it makes something fewer: in the first of these places that it has.

    They are ``merge``, ``visual``, ``tower`` and ``cache``, in this order; all else stays.

    Args:
        recipe: what is done.
        keep: the share, in (0, 1].

    Raises:
        QuickmergeError: it makes nothing fewer, or its method does not take this share.
    """
    try:
        return _keeping(recipe, keep)
    except QuickmergeError:
        raise
    except ValueError as error:  # a method that checks its own settings
        raise QuickmergeError(
            f"keep can't be {keep:g} for the recipe {recipe.label}: {first_sentence(error)}"
        ) from error


def _keeping(recipe: Recipe, keep: float) -> Recipe:
    for name in PLACES:
        merge = getattr(recipe, name)
        if isinstance(merge, Merge):
            other: dict[str, Any] = {name: replace(merge, reducer=replace(merge.reducer, keep=keep))}
            return replace(recipe, **other)
    if recipe.evictor is not None:
        return replace(recipe, cache=replace(recipe.evictor, keep=keep))
    raise QuickmergeError(
        f"keep must be 1 or left out for the recipe {recipe.label}, which keeps all tokens anyway, got {keep:g}"
    )
