"""``apply``: do to a model what a recipe says, inside a ``with`` block, and leave it as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.models.attachment import Attachment
from quickmerge.models.vlm import unwrapped
from quickmerge.recipe.ingredients import Ingredients
from quickmerge.recipe.parts import parts
from quickmerge.recipe.recipe import Recipe

__all__ = ["RecipeRun", "RecipeStats", "apply"]


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


@dataclass(frozen=True)
class RecipeStats:
    """What each ingredient says of the last prompt and of what was generated since, by the argument that asked for it.

    Prints as a few lines for each. ``["merge"]`` are `quickmerge.merge.run.RunStats`, ``["attention"]``
    `quickmerge.multipole.MultipoleStats` and ``["decoding"]`` `quickmerge.speculative.Stats`, of the last ``generate``.
    """

    recipe: str
    of: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.of[name]

    def __contains__(self, name: object) -> bool:
        return name in self.of

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON: the numbers of each ingredient by its name."""
        return {name: stats.as_dict() for name, stats in self.of.items()}

    def __str__(self) -> str:
        told = [f"{name}: {stats}".replace("\n", "\n  ").replace("\n    ", "\n  ") for name, stats in self.of.items()]
        return "\n".join(told) or "nothing is done to the model"


class RecipeRun(Attachment):
    """One recipe on one model; see `apply`.

    Args:
        model: what it attaches to.
        recipe: what is done to it.
        parts: the runs of its ingredients, in the order of entering.
    """

    def __init__(self, model: Any, recipe: Ingredients, parts: dict[str, Attachment]) -> None:
        super().__init__(model)
        self.recipe = recipe
        self.parts: dict[str, Any] = parts
        """The runs of its ingredients, which this one enters and leaves."""

    def _attach(self) -> None:
        self._undo.append(_nothing)  # so that an empty recipe counts as begun, too
        for part in self.parts.values():
            part.attach()
            self._undo.append(part.detach)

    def summary(self) -> RecipeStats:
        """What each ingredient did; prints as a few lines, and ``as_dict()`` is for JSON."""
        return RecipeStats(self.recipe.label, {name: part.summary() for name, part in self.parts.items()})


def _nothing() -> None:
    pass
