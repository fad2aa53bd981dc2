"""The run of a whole recipe: it enters those of its ingredients, leaves them, and says what they say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quickmerge.models.attachment import Attachment
from quickmerge.recipe.ingredients import Ingredients

__all__ = ["RecipeRun", "RecipeStats"]


@dataclass(frozen=True)
class RecipeStats:
    """What each ingredient says of the last prompt and of what was generated since, by the argument that asked for it.

    Prints as a few lines for each. Where several places of a vision-language model become fewer, one run counts them,
    ``["merge+visual"]``. ``["merge"]`` are `quickmerge.merge.run.RunStats`, ``["attention"]``
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
    """One recipe on one model; see `quickmerge.apply`.

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
