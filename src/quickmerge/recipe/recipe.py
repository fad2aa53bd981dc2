"""``Recipe``: what is done to a model, as one object."""

from __future__ import annotations

from dataclasses import dataclass

from quickmerge.recipe.ingredients import Ingredients

__all__ = ["Recipe"]


@dataclass(frozen=True, eq=False, repr=False)
class Recipe(Ingredients):
    """What is done to a model: every ingredient that makes it predict with fewer tokens, or with cheaper ones.

    Give it to `quickmerge.apply`. It holds settings and trained weights and no state, so one object may serve many
    models at once. Two recipes are equal if all their settings and weights are. A place takes a reducer, or a `Merge`
    where its host has to be told more: ``Merge(reducer, layer=8, mode=Prefix(min_tokens=0))``.

    Args:
        merge: for the text: the prompt's tokens in a language model.
        visual: for the visual tokens behind the projector of a vision-language model.
        tower: for a vision transformer.
        attention: settings of multipole attention, by which new tokens read the past.
        decoding: what drafts, such as ``PromptLookup()``; or `Speculation`, with the size of its trees.

    Raises:
        QuickmergeError: naming the argument, what was given and what is allowed.
    """
