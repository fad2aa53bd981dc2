"""``quickmerge recipe show`` and ``check``: what a recipe does to a model, and whether it can."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import JSON, check_output, load_model, one_sentence, quiet, write_json
from quickmerge.errors import clean_name
from quickmerge.merge.cli.vlm import is_vlm
from quickmerge.recipe.options import load_recipe

if TYPE_CHECKING:
    from quickmerge.recipe import Recipe

SHOW_EXAMPLE = "Example: quickmerge recipe show runs/recipe --model smollm2-135m --tokens 4096"
CHECK_EXAMPLE = "Example: quickmerge recipe check runs/recipe --model smollm2-135m"

RECIPE = Annotated[str, typer.Argument(help="A folder of Recipe.save_pretrained, a .json or .yaml file, or a hub id.")]
MODEL = Annotated[
    str, typer.Option("--model", help="A language, vision or vision-language model: a name, a folder, or a hub id.")
]


def show(
    recipe: RECIPE,
    model: MODEL = "smollm2-135m",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Length of the prompt.")] = 4096,
    visual: Annotated[
        int | None, typer.Option("--visual", min=0, help="How many of them are visual, where there are images.")
    ] = None,
    json: JSON = None,
) -> None:
    """Tokens by layer, FLOPs, cache, what is lossless, and from what length each ingredient pays: from shapes alone."""
    check_output(json)
    given = load_recipe(recipe)
    lm = load_for(model, given, shapes=True)
    with one_sentence():
        told = given.told(lm, tokens, visual=visual)
    print(told)
    write_json(json, {**told.as_dict(), "model": model, "recipe": given.as_dict()})


def check(recipe: RECIPE, model: MODEL = "smollm2-135m", json: JSON = None) -> None:
    """Whether all of a recipe can be done to a model together; it is loaded, since trained parts are made for one."""
    check_output(json)
    given = load_recipe(recipe)
    lm = load_for(model, given, shapes=False)
    with one_sentence():
        given.check(lm)
    print(f"{clean_name(recipe)} fits {clean_name(model)}: {given.label}")
    write_json(json, {"model": model, "recipe": given.as_dict(), "fits": True})


def load_for(name: str, recipe: Recipe, *, shapes: bool) -> Any:
    """A model of whatever kind it is; without weights where shapes do and such a model can be had so."""
    from quickmerge.models import VISION_MODELS, load_shape_only, load_vision, load_vlm

    if is_vlm(name):
        quiet()
        return load_vlm(name)[0]
    language = any(getattr(recipe, part) is not None for part in ("merge", "attention", "decoding"))
    if name in VISION_MODELS or (recipe.tower is not None and not language):
        quiet()
        return load_vision(name)[0]
    if shapes:
        quiet()
        return load_shape_only(name)
    return load_model(name)[0]
