"""``Recipe``: what is done to a model, as one object."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.recipe.ingredients import NAMES, Ingredients
from quickmerge.recipe.saving import as_data, read, write

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

    def as_dict(self) -> dict[str, Any]:
        """What `save_pretrained` would write into recipe.json, for rows of results: JSON's own types alone.

        A trained part is told by the name under which it ships, or by the folder where it would be written; and by the
        sha256 of its files.

        Raises:
            QuickmergeError: an ingredient can't be written, such as ``protect=`` or a reducer of your own.
        """
        return as_data(self._given())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write recipe.json, and trained parts beside it, into ``folder``: all of them or none; other files stay.

        Args:
            folder: where to; made if need be.

        Raises:
            QuickmergeError: an ingredient can't be written, such as ``protect=`` or a reducer of your own; or the disk
                is full or not writable. What was there before is still there.
        """
        write(self._given(), Path(folder))

    @classmethod
    def from_pretrained(cls, given: str | os.PathLike[str]) -> Recipe:
        """Read what `save_pretrained` wrote, or a file by hand.

        Args:
            given: a folder with recipe.json; or a .json, .yaml, .yml or .toml file of the same content, in which
                settings that are left out are the defaults.

        Raises:
            QuickmergeError: there is none, it is damaged, written by a newer quickmerge or out of range, or a trained
                part is missing or altered.
        """
        found = read(Path(given))
        try:
            return cls(**found)
        except QuickmergeError as error:
            raise QuickmergeError(f"{given}: {error}") from error

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NAMES}
