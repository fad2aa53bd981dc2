"""``break_even``: a recipe whose ``min_tokens`` is the length from which on merging pays, measured on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quickmerge._version import __version__
from quickmerge.errors import QuickmergeError
from quickmerge.merge.bench.break_even import LONGEST, SECONDS, SHORTEST, TURNS, BreakEven, time_merge
from quickmerge.merge.place import Merge
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.text.modes import Prefix
from quickmerge.recipe.measured import PaysFrom
from quickmerge.recipe.recipe import Recipe

__all__ = ["MeasuredRecipe", "break_even"]


@dataclass(frozen=True)
class MeasuredRecipe:
    """What `break_even` found; prints as a few lines.

    Attributes:
        timed: every length that was measured.
        recipe: with ``min_tokens`` set to the one from which on merging pays, and the record of it; None where it pays
            at none, as the recipe would better not merge prompts of these lengths.
    """

    timed: BreakEven
    recipe: Recipe | None

    @property
    def tokens(self) -> int | None:
        """The length from which on merging pays."""
        return self.timed.tokens

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {**self.timed.as_dict(), "recipe": None if self.recipe is None else self.recipe.as_dict()}

    def __str__(self) -> str:
        return str(self.timed)


def break_even(
    model: Any,
    tokenizer: Any,
    recipe: Recipe | Reducer | Merge,
    *,
    shortest: int = SHORTEST,
    longest: int = LONGEST,
    seconds: float = SECONDS,
    turns: int = TURNS,
    name: str | None = None,
    clock: Callable[..., float] | None = None,
    advance: Callable[[str], None] = lambda _: None,
) -> MeasuredRecipe:
    """Measure from which prompt length on merging pays here, and set ``min_tokens`` of the recipe to it.

    The merged prefill and the plain one take turns on the same text, with everything that the method does inside;
    lengths are halved in by their logarithm. Merging pays where it was faster in three of four turns. What else the
    recipe holds is left out meanwhile.

    Args:
        model: a causal LM in eval mode, in the dtype and on the device that it will be used in.
        tokenizer: of the model.
        recipe: whose ``merge`` is measured, in prefix mode.
        shortest: length below which nobody looks.
        longest: length beyond which nobody looks; less where the model reads less.
        seconds: no further length is begun after so long; then lengths in between stay unmeasured, which is said.
        turns: of each way, at each length, at least 3.
        name: what the record calls the model; default: its own name.
        clock: gives the seconds of a prefill, see `quickmerge.merge.bench.break_even.time_merge`.
        advance: called with a label before each length, for progress.

    Returns:
        A `MeasuredRecipe`. What was calibrated of the recipe stays with it if it reaches the texts of that still.

    Raises:
        UnsupportedModelError: for a model that is no language model, or can't be served.
        QuickmergeError: naming the argument that is out of range, or a recipe that merges no prompt.
    """
    if isinstance(recipe, (Reducer, Merge)):
        recipe = Recipe(merge=recipe)
    if not isinstance(recipe, Recipe):
        raise QuickmergeError(f"recipe must be a Recipe, a reducer or a Merge, got {recipe!r:.200}")
    merge = recipe.merges.get("merge")
    if merge is None:
        raise QuickmergeError(f"recipe must merge the text to have a break-even, got {recipe.label}")
    timed = time_merge(
        model, tokenizer, merge, shortest=shortest, longest=longest, seconds=seconds, turns=turns, clock=clock,
        advance=advance,
    )  # fmt: skip
    at = timed.at
    if at is None:
        return MeasuredRecipe(timed, None)
    mode = merge.mode or Prefix()
    assert isinstance(mode, Prefix)
    made = replace(recipe, merge=replace(merge, mode=replace(mode, min_tokens=at.tokens)))
    found = PaysFrom(
        label=made.label, model=name or Path(str(getattr(model, "name_or_path", "") or "")).name or timed.model,
        tokens=at.tokens, ratio=at.ratio, low=at.low, high=at.high, shortest=shortest,
        longest=max(longest, at.tokens), dtype=timed.dtype, device=timed.device, cpu=timed.cpu, threads=timed.threads,
        quickmerge=__version__,
    )  # fmt: skip
    known = recipe.calibration
    if known is not None and at.tokens <= known.tokens:  # it reads those texts as it did before
        known = replace(known, label=made.label)
    return MeasuredRecipe(timed, replace(made, calibration=known, break_even=found))
