"""``quickmerge calibrate``: the smallest share of the tokens at which a score stays above a floor on your documents."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.console.options import (
    DTYPE,
    JSON,
    LAYER,
    MODEL,
    OUTPUT,
    PRIOR,
    PROTECT,
    Alone,
    check_dtype,
    check_output,
    check_protect,
    load_writer,
    one_sentence,
    parse_layer,
    progress,
    read_text,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import add_prior, parse_method
from quickmerge.recipe.options import RECIPE, REDUCER, check_alone, check_folder, given_names, load_recipe, place

if TYPE_CHECKING:
    from quickmerge.recipe import MeasuredRecipe, Recipe

EXAMPLE = "Example: quickmerge calibrate --text mine/ --floor 0.97 --out runs/recipe"
MISSED = 3
"""Exit code where no share stays above the floor, or merging pays at no length."""


def calibrate(
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="A file or folder of UTF-8 texts, once for each.", metavar="PATH"),
    ] = None,
    floor: Annotated[float, typer.Option("--floor", help="Share of the plain model's score, in (0, 1].")] = 0.97,
    score: Annotated[
        str, typer.Option("--score", help="recovery, literals, or tasks with commas: needle,copy.")
    ] = "recovery",
    confident: Annotated[
        bool, typer.Option("--confident", help="The lower end of the interval must stay above the floor.")
    ] = False,
    speed: Annotated[
        bool,
        typer.Option("--speed", help="Time from which length merging pays here; min_tokens is that. Or without texts."),
    ] = False,
    model: MODEL = "smollm2-135m",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens of each document that are read.")] = 1024,
    target: Annotated[int, typer.Option("--target", min=2, help="Tokens behind them that are scored.")] = 192,
    step: Annotated[float, typer.Option("--step", help="Between the shares that are tried.")] = 0.01,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Of each task.", hidden=True)] = 24,
    literals: Annotated[int, typer.Option("--literals", min=1, help="Of each document.", hidden=True)] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Of what is held out.", hidden=True)] = 0,
    dtype: DTYPE = "float32",
    reducer: REDUCER = None,
    layer: LAYER = None,
    prior: PRIOR = None,
    protect: PROTECT = None,
    recipe: RECIPE = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records", help="Add measurements to this file as they come; resume it.", rich_help_panel=OUTPUT
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Save the recipe in this folder.", rich_help_panel=OUTPUT)
    ] = None,
    json: JSON = None,
) -> None:
    """Find the smallest share of the tokens at which quality stays above a floor on your own documents, and save it.

    Ends with code 3 where no share below 1 does, or merging pays at no length; nothing is saved then.
    """
    check_output(json)
    check_folder(out)
    check_protect(protect)
    given = {"--reducer": reducer, "--layer": layer, "--prior": prior, "--protect": protect}
    check_alone(recipe, given_names(given))
    check_dtype(dtype)
    if not text and not speed:
        raise QuickmergeError("--text must name files or folders, or --speed measure a recipe without, got neither")
    if not text and recipe is None:
        raise QuickmergeError("--speed without --text measures a recipe as it is: give it as --recipe")
    made = load_recipe(recipe) if recipe is not None else _recipe(reducer, layer, prior, protect)
    from dataclasses import replace

    from quickmerge.recipe.calibration import calibrate as search
    from quickmerge.recipe.calibration import check_floor

    with one_sentence():
        if text:
            check_floor(floor, score, 0.05, step)
        if speed and made.merges.get("merge") is None:
            raise QuickmergeError(f"--speed is for recipes that merge the text, got {made.label}")
        if out is not None or json is not None:
            made.as_dict()  # what can't be saved is told before hours of work
    if not text:
        lm, tokenizer = load_writer(model, dtype)
        timed = _timed(lm, tokenizer, made, model)
        print(timed)
        write_json(json, {"model": model, "speed": timed.as_dict()})
        _save(timed.recipe, out)
        return
    texts = _texts(text)
    lm, tokenizer = load_writer(model, dtype)
    with one_sentence(Alone.writing(lm, tokenizer)), progress() as bar:
        kept, short = _long_enough(tokenizer, texts, score)
        task = bar.add_task("measuring", total=None)
        found = search(
            lm, tokenizer, kept, made, floor=floor, score=score, tokens=tokens, target=target, confident=confident,
            step=step, samples=samples, literals=literals, seed=seed, name=clean_name(model), records=records,
            advance=lambda label: bar.update(task, advance=1, description=label),
        )  # fmt: skip
    more = {}
    if speed and found.recipe is not None:
        timed = _timed(lm, tokenizer, found.recipe, model)
        found, more = replace(found, recipe=timed.recipe), {"speed": timed.as_dict()}
    write_json(json, {"model": model, "documents": len(kept), "too_short": short, **found.as_dict(), **more})
    if short:
        print(f"{short} of {len(texts)} documents have fewer than 1,000 tokens and are left out")
    print(found)
    if more:
        print(timed)
    if found.recipe is not None and found.recipe.calibration is not None:
        print(found.recipe.calibration)
    _save(found.recipe, out)


def _timed(lm: Any, tokenizer: Any, recipe: Recipe, model: str) -> MeasuredRecipe:
    """The recipe with the length from which on it pays here."""
    from quickmerge.recipe.pays import break_even

    with one_sentence(Alone.writing(lm, tokenizer)), progress() as bar:
        task = bar.add_task("measuring", total=None)
        return break_even(
            lm, tokenizer, recipe, name=clean_name(model),
            advance=lambda label: bar.update(task, advance=1, description=f"prefill of {label}"),
        )  # fmt: skip


def _save(recipe: Recipe | None, out: Path | None) -> None:
    """Write what was found, and tell; end with the code for it where nothing was."""
    if recipe is None:
        raise typer.Exit(MISSED)
    if recipe.break_even is not None:
        print(recipe.break_even)
    if out is not None:
        recipe.save_pretrained(out)
        print(f"wrote {clean_name(out / 'recipe.json')}")


def _recipe(reducer: str | None, layer: str | None, prior: str | None, protect: str | None) -> Recipe:
    """The recipe that loose options say; its ``keep`` is what is sought."""
    from dataclasses import replace

    from quickmerge.merge.cache import Evictor
    from quickmerge.recipe import Recipe

    method = parse_method(reducer or "quickmerge", 0.5)
    if isinstance(method, Evictor):
        if given := given_names({"--layer": layer, "--prior": prior}):
            raise QuickmergeError(
                f"{given[0]} is for methods that merge, got {method.name}, which evicts from the cache"
            )
        return Recipe(cache=replace(method, min_tokens=type(method).min_tokens, protect=protect or method.protect))
    if prior is not None:
        method = add_prior(method, prior)
    return Recipe(merge=place(method, parse_layer(layer), None, protect))


def _texts(paths: list[Path]) -> list[str]:
    """Every text of some files and folders, in the order of their names."""
    from quickmerge.datasets import find_data

    for path in paths:
        if not path.exists():
            raise QuickmergeError(f"--text must name files or folders, got {clean_name(path)}, which is none")
    data = find_data(paths)
    if data.kind != "text":
        raise QuickmergeError(f"--text must name texts, got {data.kind}")
    return [read_text(path) for path in data.files]


def _long_enough(tokenizer: object, texts: list[str], score: str) -> tuple[list[str], int]:
    """Those with tokens enough to be measured, and how many are not."""
    from quickmerge.bench.quality import first_tokens
    from quickmerge.datasets.text import LEAST
    from quickmerge.recipe.calibration import SCORES

    if score not in SCORES:  # a task is asked in the midst of all texts together
        return texts, 0
    kept = [text for text in texts if len(first_tokens(tokenizer, text, LEAST)) >= LEAST]
    if not kept:
        raise QuickmergeError(f"--text must name documents of at least {LEAST} tokens, got {len(texts)} shorter ones")
    return kept, len(texts) - len(kept)
