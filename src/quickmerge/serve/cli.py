"""``quickmerge package``: a model folder that ``transformers serve`` runs with a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quickmerge.console.options import (
    LAYER,
    MIN_TOKENS,
    OUTPUT,
    PRIOR,
    check_keep,
    one_sentence,
    parse_layer,
    quiet,
)
from quickmerge.errors import QuickmergeError, clean_name, near_match
from quickmerge.recipe.options import (
    ATTENTION,
    BUDGET,
    CACHE,
    DRAFTER,
    KEEP,
    RECIPE,
    REDUCER,
    TREE,
    check_alone,
    check_helpers,
    given_names,
    load_recipe,
    make_recipe,
    text_merge,
)

if TYPE_CHECKING:
    pass

EXAMPLE = "Example: quickmerge package --model smollm2-135m --keep 0.4 --out served"
LINKS = ("hard", "symbolic")


def package(
    model: Annotated[
        str, typer.Option("--model", help="A language or vision-language model: smollm2-135m, a folder, or a hub id.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The new folder.", rich_help_panel=OUTPUT)],
    recipe: RECIPE = None,
    reducer: REDUCER = None,
    keep: KEEP = None,
    layer: LAYER = None,
    prior: PRIOR = None,
    min_tokens: MIN_TOKENS = None,
    cache: CACHE = None,
    attention: ATTENTION = None,
    budget: BUDGET = None,
    drafter: DRAFTER = None,
    tree: TREE = None,
    link: Annotated[
        str | None,
        typer.Option(
            "--link", help="Link weights: hard, or symbolic. Default: hard if possible.", rich_help_panel=OUTPUT
        ),
    ] = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy weights, not link them.", rich_help_panel=OUTPUT)] = False,
) -> None:
    """Write a model folder that stock `transformers serve` runs with a recipe, behind the OpenAI API."""
    merging = {"--reducer": reducer, "--keep": keep, "--layer": layer, "--prior": prior, "--min-tokens": min_tokens}
    helpers = {"--cache": cache, "--attention": attention, "--budget": budget, "--drafter": drafter, "--tree": tree}
    check_alone(recipe, given_names({**merging, **helpers}))
    check_helpers(attention, budget, drafter, tree)
    if link is not None and link not in LINKS:
        raise QuickmergeError(f"--link must be {' or '.join(LINKS)}, got {link!r}{near_match(link, LINKS)}")
    if link is not None and copy:
        raise QuickmergeError(f"--link {link} must be left out beside --copy")
    if keep is not None:
        check_keep(keep)
    depth = parse_layer(layer)
    # what takes seconds to import comes after what can be told at once
    if recipe is not None:
        made = load_recipe(recipe)
    else:
        asked = given_names(merging) or not given_names(helpers)
        merge = text_merge(reducer, keep, depth, prior, min_tokens) if asked else None
        made = make_recipe(merge=merge, cache=cache, attention=attention, budget=budget, drafter=drafter, tree=tree)
    quiet()
    from quickmerge.serve.package import package as write

    with one_sentence():
        done = write(model, made, out, link="copy" if copy else link or "auto")  # type: ignore[arg-type]
    how = {"hard": "hard links", "symbolic": "symbolic links", "copy": "copies"}[done.linked]
    size = f"{done.weights / 2**20:.0f} MiB of weights as {how}"
    print(f"{clean_name(str(out))}: {done.model}, {clean_name(made.label)}; {size}")
    print(f"serve it: transformers serve {clean_name(str(out))} --trust-remote-code")
