"""The short form of a recipe, as other programs' flat arguments can say it: ``reducer=quickmerge,keep=0.4,layer=8``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.merge.cli.options import add_prior, parse_budget
from quickmerge.merge.place import Merge
from quickmerge.merge.reducers import REDUCERS, make_reducer
from quickmerge.merge.text.modes import BlockCausal, Prefix, as_mode
from quickmerge.recipe import Recipe
from quickmerge.recipe.options import load_recipe, make_recipe

__all__ = ["SETTINGS", "is_setting", "recipe_of"]

USUAL = 0.4
"""The share that is kept where nobody says."""

HOST = ("layer", "mode", *(f.name for kind in (Prefix, BlockCausal) for f in fields(kind)))
"""Settings of where and how a reducer acts. ``protect`` and ``tokenizer`` can't be written as a word."""

OTHERS = ("cache", "attention", "drafter", "tree")
"""What goes beside a reducer, or alone; as the options of the command line of the same names."""

_REDUCER = {f.name for kind in REDUCERS.values() for f in fields(kind)}
SETTINGS = tuple(
    sorted({"reducer", "keep", "tokens", "prior", "preset", *HOST, *OTHERS, *_REDUCER} - {"protect", "tokenizer"})
)
"""Every name that `recipe_of` takes."""


def is_setting(name: str) -> bool:
    """Whether `recipe_of` takes a setting of this name."""
    return name in SETTINGS


def recipe_of(recipe: Recipe | str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> Recipe:
    """The recipe that is given, or that settings say; an empty one for neither.

    Args:
        recipe: a recipe, or the folder, file or hub id where one lies.
        settings: ``reducer``, with ``keep`` (a share) or ``tokens`` (a count), ``layer`` (a block or a list of them),
            ``mode`` (``prefix`` or ``block-causal``), ``prior`` and every setting of the mode and of the reducer;
            ``cache``, ``attention`` (such as ``multipole:budget=512``), ``drafter`` and ``tree`` as on the command
            line. What both the mode and the reducer have is the mode's; the reducer's own can stand in its name,
            ``reducer="truncate:sinks=8"``.

    Raises:
        QuickmergeError: both are given, there is no such recipe or reducer, or a setting is out of place or range.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    if recipe is not None:
        if given:
            name = sorted(given)[0]
            raise QuickmergeError(f"{name} can't be used with recipe, which says all that is done: leave one out")
        if isinstance(recipe, Recipe):
            return recipe
        return load_recipe(os.path.expanduser(os.fspath(recipe)))
    others = {name: given.pop(name) for name in OTHERS if name in given}
    words = {name: value if isinstance(value, str) else f"{value:g}" for name, value in others.items()}
    if "tree" in words and "drafter" not in words:
        raise QuickmergeError("tree is for drafted tokens: give drafter too")
    merge = _merge(given)
    places: dict[str, Any] = {} if merge is None else {"merge": merge}
    return make_recipe(cache=words.get("cache"), attention=words.get("attention"), drafter=words.get("drafter"),
                       tree=words.get("tree"), **places)  # fmt: skip


def _merge(given: dict[str, Any]) -> Merge | None:
    name = given.pop("reducer", None)
    if name is None:
        if given:
            raise QuickmergeError(f"{sorted(given)[0]} is for a reducer: give reducer=quickmerge or another too")
        return None
    if not isinstance(name, str):
        raise QuickmergeError(f"reducer must be a name such as quickmerge, got {name!r:.80}")
    mode = str(given.pop("mode", Prefix.name)).replace("-", "_")
    kind = BlockCausal if mode == BlockCausal.name else Prefix
    of_mode = {f.name: given.pop(f.name) for f in fields(kind) if f.name in given}
    layer, prior = given.pop("layer", None), given.pop("prior", None)
    keep = _budget(given.pop("keep", None), given.pop("tokens", None))
    first = name.partition(":")[0]
    kinds = [REDUCERS[first], kind] if first in REDUCERS else []
    known = [*dict.fromkeys(f.name for each in kinds for f in fields(each) if f.name in SETTINGS), "preset"]
    for setting in given:
        if kinds and setting not in known:
            raise QuickmergeError(f"{setting} is no setting of {first} or of {kind.name} mode: give one of "
                                  f"{', '.join(known)}{near_match(setting, known)}")  # fmt: skip
    reducer = make_reducer(name, keep=keep, **given)
    if prior is not None:
        reducer = add_prior(reducer, str(prior))
    return Merge(reducer, list(layer) if isinstance(layer, (list, tuple)) else layer, as_mode(mode, of_mode))


def _budget(keep: Any, tokens: Any) -> Any:
    for name, value in (("keep", keep), ("tokens", tokens)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise QuickmergeError(f"{name} must be a number, got {value!r:.80}")
    return parse_budget(None if keep is None else float(keep), tokens, USUAL)
