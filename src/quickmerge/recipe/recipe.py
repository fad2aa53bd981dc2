"""``Recipe``: what is done to a model, as one object; and ``apply``, which does it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Unpack

from quickmerge.errors import QuickmergeError
from quickmerge.models.card import Section
from quickmerge.models.kinds import KINDS, Kind, looks_like_id
from quickmerge.models.share import HubMixin, HubOptions, fetched
from quickmerge.models.vlm import unwrapped
from quickmerge.recipe.card import card_sections
from quickmerge.recipe.ingredients import NAMES, Ingredients
from quickmerge.recipe.measured import Measured, PaysFrom
from quickmerge.recipe.parts import parts
from quickmerge.recipe.run import RecipeRun
from quickmerge.recipe.saving import RECORDS, TYPE, as_data, from_data, read, write
from quickmerge.recipe.tell import Told, tell

__all__ = ["Recipe", "apply"]


@dataclass(frozen=True, eq=False, repr=False)
class Recipe(HubMixin, Ingredients):
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
        cache: what leaves the cache of a prompt when it has been read, such as ``SnapKV(keep=0.3)``; a share is that of
            `AttentionNorm`.
        calibration: what was measured of just this recipe, see `quickmerge.calibrate`. It does nothing: recipes are
            equal whatever was measured of them. One that was made from another, with other settings, has none.
        break_even: from which length of a prompt merging pays on a machine, see `quickmerge.break_even`; does nothing
            either.

    Raises:
        QuickmergeError: naming the argument, what was given and what is allowed.
    """

    hub_kind: ClassVar[Kind] = KINDS["recipe"]
    calibration: Measured | None = None
    break_even: PaysFrom | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, kind in RECORDS.items():
            record, maker = getattr(self, name), "calibrate" if kind is Measured else name
            if record is None:
                continue
            if not isinstance(record, kind):
                raise QuickmergeError(f"{name} must be that of quickmerge.{maker}, or None, got {record!r:.200}")
            if record.label != self.label:
                object.__setattr__(self, name, None)

    def as_dict(self) -> dict[str, Any]:
        """What `save_pretrained` would write into recipe.json, for rows of results: JSON's own types alone.

        A trained part is told by the name under which it ships, or by the folder where it would be written; and by the
        sha256 of its files.

        Raises:
            QuickmergeError: an ingredient can't be written, such as a function of ``protect`` or a reducer
                of your own.
        """
        return as_data(self._given(), self._records())

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write recipe.json, and trained parts beside it, into ``folder``: all of them or none; other files stay.

        Args:
            folder: where to; made if need be.

        Raises:
            QuickmergeError: an ingredient can't be written, such as a function of ``protect`` or a reducer
                of your own; or the disk
                is full or not writable. What was there before is still there.
        """
        write(self._given(), Path(folder), self._records())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """The recipe that `as_dict` gave: with what it leaves out at its default, ``type`` and ``version`` too.

        A trained part must ship with quickmerge (``{"shipped": NAME}``): folders are `from_pretrained`'s.

        Args:
            data: JSON's own types, such as ``{"visual": {"type": "SCOPE", "keep": 0.25}}``.

        Raises:
            QuickmergeError: a type or a setting is unknown or out of range.
        """
        found = from_data({"type": TYPE, **data}, None)
        try:
            return cls(**found)
        except QuickmergeError as error:
            raise QuickmergeError(f"recipe: {error}") from error

    @classmethod
    def from_pretrained(cls, given: str | os.PathLike[str], **hub: Unpack[HubOptions]) -> Recipe:
        """Read what `save_pretrained` wrote, or a file by hand.

        Args:
            given: a folder with recipe.json; or a .json, .yaml, .yml or .toml file of the same content, in which
                settings that are left out are the defaults; or an id of the hub such as ``"owner/name"``.
            **hub: how it is taken from there, see `quickmerge.models.share.HubOptions`.

        Raises:
            QuickmergeError: there is none, it is damaged, written by a newer quickmerge or out of range, or a trained
                part is missing or altered.
        """
        folder = Path(fetched(given, cls.hub_kind, **hub))
        # In the hub's cache a repository's files are links to one folder of it, blobs.
        home = folder.parent.parent / "blobs" if looks_like_id(given) else None
        found = read(folder, home)
        try:
            made = cls(**found)
        except QuickmergeError as error:
            raise QuickmergeError(f"{given}: {error}") from error
        for name in RECORDS:
            if name in found and getattr(made, name) is None:
                raise QuickmergeError(
                    f"{given}: {name} is of another recipe, {found[name].label!r:.200}, and this is "
                    f"{made.label!r:.200}: leave it out, or calibrate again"
                )
        return made

    def push_to_hub(
        self, repo_id: str, *, model: Any = None, tokens: int = 4096, results: Any = None, command: str | None = None,
        license: str | None = None, base_model: str | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Save this on the Hugging Face hub, with a card that tells each ingredient.

        Args:
            repo_id: an id such as ``"owner/name"``.
            model: whose shapes the card tells the recipe's effect on, see `told`; None leaves that out.
            tokens: length of the prompt of which that is told.
            results: for the card, as are ``command``, ``license`` and ``base_model``; see `HubMixin.push_to_hub`.
            **options: ``private``, ``token``, ``commit_message``, ``revision`` and ``create_pr``.

        Returns:
            The address of the commit, or of the proposal.

        Raises:
            QuickmergeError: as `HubMixin.push_to_hub`, and as `told`.
        """
        told = {"results": results, "command": command, "license": license, "base_model": base_model}
        return self._push(repo_id, {**told, "sections": self.hub_sections(model, tokens)}, **options)

    def hub_sections(self, model: Any = None, tokens: int = 4096) -> list[Section]:
        """What the card says of the ingredients, and of what they do to a model if one is given."""
        return card_sections(self, None if model is None else self.told(model, tokens))

    # On a model -----------------------------------------------------------------------------------------------------

    def check(self, model: Any) -> None:
        """Raise unless all of this can be done to ``model`` together; what is tried is undone again.

        Args:
            model: a model that `apply` takes, with its weights: a trained part is known to be made for them.

        Raises:
            UnsupportedModelError: for a model that can't be served, or has no such place, naming its class.
            QuickmergeError: for a setting that does not fit the model, or ingredients that don't go together.
        """
        run = apply(model, self)
        run.attach()
        run.detach()

    def told(self, model: Any, tokens: int = 4096, *, visual: int | None = None) -> Told:
        """What this does to ``model``, from its shapes alone: tokens by layer, FLOPs, bytes, and where it pays.

        Args:
            model: a model that `apply` takes; one on the meta device does.
            tokens: length of the prompt, of a language model with or without images.
            visual: how many of them are visual; None where nobody knows.

        Returns:
            A `Told`, which prints as a few lines, and whose ``as_dict()`` is for JSON.

        Raises:
            UnsupportedModelError: for a model that has no such place, or can't be served.
            QuickmergeError: for a number out of range, or a setting that does not fit the model's shapes.
        """
        return replace(tell(self, model, tokens, visual), **self._records())

    def _records(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in RECORDS}

    def _given(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in NAMES}


def apply(model: Any, recipe: Recipe) -> RecipeRun:
    """Do to ``model`` what ``recipe`` says while the returned run is entered as a context manager.

    Inside, plain ``model.generate(...)`` is all that is needed: the prompt is merged, new tokens read the past by its
    clusters, and several are drafted and checked a pass, as far as the recipe asks for it. An ingredient does what it
    does alone, see `quickmerge.reduce`, `quickmerge.multipole` and `quickmerge.SpeculativeDecoding`.

    With ``decoding`` in the recipe ``generate`` decodes in that way alone: ``custom_generate``, ``assistant_model`` and
    ``prompt_lookup_num_tokens`` are refused. Each call gets a copy of the drafter, so threads may share the run.

    Args:
        model: a language model, a vision-language model or a vision transformer, as `quickmerge.reduce` takes them; it
            may be wrapped as there.
        recipe: what is done to it. An empty one does nothing.

    Returns:
        A `RecipeRun`: enter it with ``with``, or call its ``attach()`` and later ``detach()``; afterwards ask it for
        its ``summary()``. A run that is never entered does nothing, and warns of it when it goes. If one ingredient
        can't begin, none does. Copies and pickles of the model that are made inside are of the plain model.

    Raises:
        UnsupportedModelError: for a model that can't be served, or has no such place, naming its class.
        QuickmergeError: for a setting that does not fit the model, or a recipe that is none.
    """
    if not isinstance(recipe, Ingredients):
        raise QuickmergeError(f"recipe must be a Recipe such as Recipe(merge=QuickMerge(keep=0.4)), got "
                              f"{recipe!r:.200}")  # fmt: skip
    return RecipeRun(unwrapped(model), recipe, parts(model, recipe)).warn_if_unused("quickmerge.apply")
