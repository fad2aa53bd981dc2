"""``quickmerge bench text``: reducers at every keep, or recipes beside the plain model, on the same documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickmerge.console.options import (
    FEWER,
    JSON,
    LAYER,
    MAX_NEW_TOKENS,
    PRIOR,
    PROTECT,
    RARE_DTYPE,
    REPORT,
    check_dtype,
    check_output,
    one_sentence,
    progress,
)
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.bench import load_documents, measure_text
from quickmerge.recipe.options import check_alone, given_names, load_recipe

TEXT_EXAMPLE = (
    "Example: quickmerge bench text a.txt b.txt --reducer quickmerge,tome,random --keep 0.2,0.42 --out runs/bench; "
    "quickmerge bench text a.txt b.txt --recipe runs/one --recipe runs/two"
)
KEEPS, METHODS = "0.2,0.42,0.6", "quickmerge,random"


def text(
    text: Annotated[list[Path], typer.Argument(help="UTF-8 files of at least 1,000 tokens.", metavar="FILES")],
    model: Annotated[str, typer.Option("--model", help="smollm2-135m, a folder, or a Hugging Face id.")] = (
        "smollm2-135m"
    ),
    context: Annotated[int, typer.Option("--context", help="Tokens of context per document.")] = 1024,
    target: Annotated[int, typer.Option("--target", help="Tokens of continuation that are scored.")] = 192,
    reducer: Annotated[
        str | None,
        typer.Option(
            "--reducer",
            help=f"Names with commas; settings follow: quickmerge:recency=0.5. Default: {METHODS}.",
            rich_help_panel=FEWER,
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", help=f"Shares of the tokens, with commas. Default: {KEEPS}.", rich_help_panel=FEWER),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="share, or entropy: shares are means over texts; or entropy:0.42.",
            hidden=True,
        ),
    ] = None,
    layer: LAYER = None,
    prior: PRIOR = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="A recipe to measure, once for each, not --reducer.", rich_help_panel=FEWER),
    ] = None,
    protect: PROTECT = None,
    literals: Annotated[
        int,
        typer.Option("--literals", min=0, help="Ask for so many literals of each document, too."),
    ] = 0,
    max_new_tokens: MAX_NEW_TOKENS = 64,
    dtype: RARE_DTYPE = "float32",
    out: REPORT = None,
    json: JSON = None,
) -> None:
    """Context recovery and cost of reducers at every keep, or of recipes, on the same tokens of your documents.

    Of recipes, what is written behind the documents is measured too.
    """
    check_output(json, out / "report.html" if out is not None else None)
    check_dtype(dtype)
    if not recipe:
        kind, colon, shares = (budget or "share").partition(":")
        if colon and keep is not None:
            raise QuickmergeError(f"--keep must be left out where --budget names a share, got {keep} and {budget}")
        kept = (shares if colon else keep) or KEEPS
        measure_text(
            text, model, context, target, reducer or METHODS, kept, layer, prior, out, json, kind, protect, literals,
            dtype,
        )  # fmt: skip
        return
    options = {
        "--protect": protect,
        "--reducer": reducer,
        "--keep": keep,
        "--budget": budget,
        "--layer": layer,
        "--prior": prior,
    }
    given = given_names(options)
    check_alone(recipe[0], given)
    if max_new_tokens < 2:
        raise QuickmergeError(f"--max-new-tokens must be at least 2 with --recipe, got {max_new_tokens}")
    from quickmerge.console.results import show_result
    from quickmerge.models.precision import dtype_name
    from quickmerge.models.spans import tokenizer_of
    from quickmerge.recipe.bench import PLAIN, bench_recipes, recipes_report

    names = [Path(each).absolute().name.removesuffix(Path(each).suffix) or each for each in recipe]
    if twice := [name for name in names if [PLAIN.name, *names].count(name) > 1]:
        raise QuickmergeError(f"--recipe must give each recipe a name of its own, got {twice[0]!r} for two ways")
    recipes = {name: load_recipe(each) for name, each in zip(names, recipe, strict=True)}
    lm, alone, documents = load_documents(text, model, context, target, dtype)
    with progress() as bar, one_sentence(alone):
        task = bar.add_task("measuring", total=len(documents) * (1 + len(recipes)))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=Path(label).name)

        found = bench_recipes(
            lm, documents, recipes, max_new_tokens=max_new_tokens, literals=literals,
            tokenizer=tokenizer_of(lm) if literals else None, advance=advance,
        )  # fmt: skip
    found = found.about(
        model=model, dtype=dtype_name(lm), context=context, target=target, max_new_tokens=max_new_tokens,
        documents=[document.name for document in documents],
    )  # fmt: skip
    show_result(found, recipes_report(found.rows, found.meta), out=out, json=json, records="documents")
