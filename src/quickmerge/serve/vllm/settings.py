"""What is asked of a model in vLLM: a recipe in its configuration, put there by ``hf_overrides``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quickmerge.errors import QuickmergeError
from quickmerge.merge.place import Merge
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.budget import Count, Ratio
from quickmerge.recipe import Recipe

__all__ = ["KEY", "check_only", "recipe_of", "visual_of"]

KEY = "quickmerge"
"""The entry of ``hf_overrides``."""

EXAMPLE = '{"visual": {"type": "SCOPE", "keep": 0.25}}'


def recipe_of(config: Any) -> Recipe:
    """The recipe in a model's configuration: what `Recipe.as_dict` gives, or the folder that holds one.

    Args:
        config: of transformers, with the attribute ``quickmerge``.

    Raises:
        QuickmergeError: there is none, or it is not one.
    """
    given = getattr(config, KEY, None)
    if isinstance(given, str) and given.strip():
        return Recipe.from_pretrained(Path(given).expanduser())
    if isinstance(given, Mapping):
        return Recipe.from_dict(given)
    raise QuickmergeError(
        f"hf_overrides must hold {KEY!r}, the recipe as a dict such as {EXAMPLE} or the folder of one, got "
        f"{given!r:.80}"
    )


def check_only(recipe: Recipe, place: str) -> None:
    """Raise unless a recipe asks for ``place``, and for nothing beside it that vLLM's model would not do."""
    asked = {name: value for name in ("merge", "visual", "tower", "attention", "cache")
             if (value := getattr(recipe, name)) is not None}  # fmt: skip
    others = [name for name in asked if name != place]
    if others:
        raise QuickmergeError(
            f"{others[0]} must be left out of hf_overrides[{KEY!r}], since this model of vLLM does {place} alone"
        )
    if place not in asked:
        raise QuickmergeError(f"hf_overrides[{KEY!r}] must hold {place}, which this model of vLLM does, got none")


def visual_of(config: Any, positions: str) -> Reducer:
    """The reducer for visual tokens that a configuration asks for.

    How many tokens are kept must be known before an image is looked at, and which ones must not depend on the question:
    vLLM encodes an image once, and serves it to whoever sends it again.

    Args:
        config: of transformers, with the attribute ``quickmerge``.
        positions: what this model does with the places of the tokens that stay, ``"kept"`` or ``"consecutive"``.

    Raises:
        QuickmergeError: it asks for something that can't be.
    """
    recipe = recipe_of(config)
    check_only(recipe, "visual")
    merge = recipe.visual
    assert isinstance(merge, Merge)
    reducer = merge.reducer
    if merge.layer not in (None, 0, (0,)):
        raise QuickmergeError(
            f"layer must be 0 (behind the projector) in vLLM, whose language model reads the tokens as they come, got "
            f"{merge.layer!r}"
        )
    if merge.positions != positions:
        why = (
            "whose rotary positions are those of the tokens that are there"
            if positions == "consecutive"
            else "whose visual tokens have places in a grid"
        )
        raise QuickmergeError(f"positions must be {positions!r} in this model of vLLM, {why}, got {merge.positions!r}")
    if not isinstance(reducer.budget, (Count, Ratio)):
        raise QuickmergeError(
            f"keep must be a share or a Count in vLLM, which makes room before it looks at an image, got "
            f"{reducer.keep!r}"
        )
    if "text" in reducer.needs.visual:
        raise QuickmergeError(
            f"visual must choose by the image alone in vLLM, which keeps what an image became for whoever sends it "
            f"again, and {reducer.name} also reads the question: aligned=1 makes TrimTokenator not look at it"
        )
    if reducer.proportional:
        raise QuickmergeError(
            f"proportional must be False in vLLM, whose attention can't count a merged token as the tokens in it, got "
            f"{reducer.label}: give {reducer.name} with proportional=False"
        )
    return reducer
