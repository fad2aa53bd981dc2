"""Options of commands that make a recipe, take one, or save it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import CHEAPER, FEWER, OUTPUT, one_sentence, told_min_tokens
from quickmerge.errors import QuickmergeError
from quickmerge.files import check_output

if TYPE_CHECKING:
    from quickmerge.merge.cache import Evictor
    from quickmerge.merge.place import Merge
    from quickmerge.recipe import Recipe

__all__ = [
    "ATTENTION",
    "BUDGET",
    "CACHE",
    "DRAFTER",
    "IMAGE_CACHE",
    "KEEP",
    "RECIPE",
    "REDUCER",
    "SAVE_RECIPE",
    "SHARE",
    "TREE",
    "check_alone",
    "check_folder",
    "check_helpers",
    "given_names",
    "load_recipe",
    "make_recipe",
    "place",
    "record",
    "record_ingredients",
    "save_recipe",
    "text_merge",
]

SHARE = 0.4
"""Of the tokens of a text that is kept where nobody says."""

REDUCER = Annotated[
    str | None,
    typer.Option("--reducer", help="See quickmerge ls; settings follow. Default: quickmerge.", rich_help_panel=FEWER),
]
KEEP = Annotated[
    float | None,
    typer.Option("--keep", help=f"Share of the tokens kept, in (0, 1]. Default: {SHARE:g}.", rich_help_panel=FEWER),
]
RECIPE = Annotated[
    str | None,
    typer.Option(
        "--recipe", help="All that is done: a folder of --save-recipe, a file, a hub id.", rich_help_panel=FEWER
    ),
]
SAVE_RECIPE = Annotated[
    Path | None,
    typer.Option("--save-recipe", help="Save what was done to the model in this folder.", rich_help_panel=OUTPUT),
]
ATTENTION = Annotated[
    str | None,
    typer.Option(
        "--attention", help="multipole: read the past by its clusters; settings follow.", rich_help_panel=CHEAPER
    ),
]
BUDGET = Annotated[
    int | None,
    typer.Option(
        "--budget", min=0, help="Tokens of clusters read exactly. Default: 512.", rich_help_panel=CHEAPER, hidden=True
    ),
]
_CACHE_HELP = "Share of the cache that stays, or a method: snapkv:keep=0.3."
CACHE = Annotated[str | None, typer.Option("--cache", help=_CACHE_HELP, rich_help_panel=FEWER)]
IMAGE_CACHE = Annotated[str | None, typer.Option("--cache", help=_CACHE_HELP, rich_help_panel=FEWER, hidden=True)]
DRAFTER = Annotated[
    str | None,
    typer.Option(
        "--drafter",
        help="lookup, suffix, smollm2-135m (its heads), a folder of heads, a hub id.",
        rich_help_panel=CHEAPER,
    ),
]
TREE = Annotated[
    str | None,
    typer.Option(
        "--tree",
        help="Drafted tokens that a pass reads: a number. Default: auto.",
        rich_help_panel=CHEAPER,
        hidden=True,
    ),
]


def given_names(options: Mapping[str, Any]) -> list[str]:
    """The options that somebody gave, of all these by name; None is one that nobody gave."""
    return [name for name, value in options.items() if value is not None]


def check_alone(recipe: str | None, given: list[str]) -> None:
    """Raise QuickmergeError where options stand beside ``--recipe`` that it says already."""
    if recipe is not None and given:
        raise QuickmergeError(f"{given[0]} can't be used with --recipe, which says all that is done: leave one out")


def check_helpers(attention: str | None, budget: int | None, drafter: str | None, tree: str | None) -> None:
    """Raise QuickmergeError for a setting of what was not asked for."""
    if tree is not None and drafter is None:
        raise QuickmergeError("--tree is for drafted tokens: give --drafter too")
    if budget is not None and attention is None:
        raise QuickmergeError("--budget is for multipole attention: give --attention multipole too")


def load_recipe(given: str) -> Recipe:
    """The recipe that ``--recipe`` names.

    Raises:
        QuickmergeError: there is none, or it can't be read.
    """
    from quickmerge.recipe import Recipe

    with one_sentence():
        return Recipe.from_pretrained(os.path.expanduser(given))


def make_recipe(
    *, attention: str | None = None, budget: int | None = None, drafter: str | None = None, tree: str | None = None,
    cache: str | Evictor | None = None, **places: Any,
) -> Recipe:  # fmt: skip
    """The recipe that options say.

    Args:
        attention: ``--attention``, with ``budget`` beside it.
        budget: ``--budget``.
        drafter: ``--drafter``, with ``tree`` beside it.
        tree: ``--tree``.
        cache: ``--cache``, or what it stands for.
        **places: `Merge` by place, as those of `quickmerge.Recipe`; None is passed over.

    Raises:
        QuickmergeError: a setting is unknown or out of range.
    """
    from quickmerge.merge.cli.options import parse_cache
    from quickmerge.multipole.cli import parse_attention
    from quickmerge.recipe import Recipe, Speculation
    from quickmerge.speculative.cli import load_drafter, parse_tree

    settings = None if attention is None else parse_attention(attention, budget)
    with one_sentence():
        decoding = None if drafter is None else Speculation(load_drafter(drafter), tree=parse_tree(tree))
        evictor = parse_cache(cache) if isinstance(cache, str) else cache
        return Recipe(**places, cache=evictor, attention=settings, decoding=decoding)


def text_merge(
    reducer: str | None, keep: float | None, layer: int | list[int] | None, prior: str | None,
    min_tokens: int | None, protect: str | None = None,
) -> Merge:  # fmt: skip
    """How a text is merged by what ``--reducer``, ``--keep``, ``--layer`` (parsed), ``--prior`` and so on say.

    Raises:
        QuickmergeError: a setting is unknown or out of range.
    """
    from quickmerge.merge.cli.options import add_prior, parse_reducer

    method = parse_reducer(reducer or "quickmerge", SHARE if keep is None else keep)
    return place(method if prior is None else add_prior(method, prior), layer, min_tokens, protect)


def place(method: Any, layer: int | list[int] | None, min_tokens: int | None, protect: str | None = None) -> Merge:
    """Where and how a reducer acts; None leaves a setting to its default."""
    from quickmerge.merge.place import Merge
    from quickmerge.merge.text.modes import Prefix

    with one_sentence():
        given = {**told_min_tokens(min_tokens), **({} if protect is None else {"protect": protect})}
        return Merge(method, layer, Prefix(**given) if given else None)


def save_recipe(folder: Path | None, recipe: Recipe) -> None:
    """Save a recipe where ``--save-recipe`` says; None saves nothing."""
    if folder is not None:
        recipe.save_pretrained(folder)


def check_folder(folder: Path | None) -> None:
    """Before long work: make sure that a recipe can be saved there."""
    if folder is not None:
        check_output(folder / "recipe.json")


def record(recipe: Recipe) -> dict[str, Any]:
    """What a JSON of results holds of a recipe, so that whoever reads it can make them again."""
    return {"recipe": recipe.as_dict()}


def record_ingredients(ingredients: Mapping[str, Any]) -> dict[str, Any]:
    """The same of what an arm of a benchmark says that it does; see `quickmerge.bench.harness.Arm`."""
    from quickmerge.merge.place import Merge
    from quickmerge.recipe import Recipe, Speculation

    given = dict(ingredients)
    for name in ("merge", "visual", "tower"):
        if isinstance(given.get(name), tuple):
            given[name] = Merge(*given[name])
    if "decoding" in given:
        drafter, tree = given["decoding"]
        given["decoding"] = Speculation(drafter, tree=tree)
    return record(Recipe(**given))
