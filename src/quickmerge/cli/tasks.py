"""``quickmerge bench tasks``: what is still known of a prompt, by reducers at every keep or by recipes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quickmerge.console.options import (
    DTYPE,
    FEWER,
    JSON,
    LAYER,
    MODEL,
    OUTPUT,
    PRIOR,
    PROTECT,
    REPORT,
    Alone,
    check_dtype,
    check_output,
    check_protect,
    load_writer,
    one_sentence,
    parse_keeps,
    parse_layer,
    progress,
    read_text,
)
from quickmerge.errors import QuickmergeError, near_match
from quickmerge.merge.cli.options import add_prior, parse_method, parse_reducer
from quickmerge.recipe.options import check_alone, given_names, load_recipe

if TYPE_CHECKING:
    from quickmerge.recipe import Recipe

EXAMPLE = (
    "Example: quickmerge bench tasks --tasks needle,copy --format chat --reducer quickmerge,random --keep 0.2,0.42 "
    "--seeds 0:12 --records runs/tasks.jsonl"
)
KEEPS, METHODS = "0.2,0.42", "quickmerge,random"
USUAL = "needle,needles4,nearby,copy,labels,constant"
"""Tasks that the smallest model solves when it reads everything."""
ASKED = {"last": 1, "first": 1, "later": 4}
"""Questions about a document: where each costs no prompt of its own there are more."""


def tasks(
    tasks: Annotated[str, typer.Option("--tasks", help="Names with commas, or all.")] = USUAL,
    model: MODEL = "smollm2-135m",
    format: Annotated[
        str, typer.Option("--format", help="How prompts end: cue (a begun answer), bare (Answer:) or chat.")
    ] = "cue",
    mode: Annotated[
        str, typer.Option("--mode", help="The question: last, first, or later, the document having been read.")
    ] = "last",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of a prompt.")] = 1024,
    seeds: Annotated[str, typer.Option("--seeds", help="Samples of each task, as 0:12.")] = "0:4",
    questions: Annotated[
        int | None, typer.Option("--questions", min=1, help="About each document. Default: 1, or 4 with later.")
    ] = None,
    documents: Annotated[
        list[Path] | None, typer.Option("--documents", help="Text to hide facts in, once for each file.")
    ] = None,
    dtype: DTYPE = "bfloat16",
    reducer: Annotated[
        str | None,
        typer.Option(
            "--reducer", help=f"Names with commas; settings follow. Default: {METHODS}.", rich_help_panel=FEWER
        ),
    ] = None,
    keep: Annotated[
        str | None,
        typer.Option("--keep", help=f"Shares of the tokens, with commas. Default: {KEEPS}.", rich_help_panel=FEWER),
    ] = None,
    layer: LAYER = None,
    prior: PRIOR = None,
    protect: PROTECT = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="A recipe to measure, once for each, --reducer or not.", rich_help_panel=FEWER),
    ] = None,
    records: Annotated[
        Path | None,
        typer.Option(
            "--records", help="Add measurements to this file as they come; resume it.", rich_help_panel=OUTPUT
        ),
    ] = None,
    out: REPORT = None,
    json: JSON = None,
) -> None:
    """Exact answers to synthetic questions about long prompts, and what reading these took.

    Every answer is scored behind the prompt that the method reduced; the plain model is always measured too.
    """
    from quickmerge.datasets.task_prompts import FORMATS, MODES
    from quickmerge.datasets.tasks import TASKS, TaskMaker

    check_output(json, out / "report.html" if out is not None else None)
    names = list(TASKS) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    for option, given, allowed in (
        *(("--tasks", name, tuple(TASKS)) for name in names),
        ("--format", format, FORMATS), ("--mode", mode, MODES),
    ):  # fmt: skip
        if given not in allowed:
            raise QuickmergeError(
                f"{option} must be one of {', '.join(allowed)}, got {given!r}{near_match(given, allowed)}"
            )
    check_dtype(dtype)
    chosen = _range("--seeds", seeds)
    texts = [read_text(path) for path in documents or ()]
    check_protect(protect)
    ways = _ways(reducer, keep, layer, prior, recipe or [], protect)
    from quickmerge.console.results import show_result
    from quickmerge.recipe.tasks import bench_tasks, tasks_report

    lm, tokenizer = load_writer(model, dtype)
    with one_sentence(Alone.writing(lm, tokenizer)):
        maker = TaskMaker(tokenizer, tokens, texts, queries=questions or ASKED[mode])
        with progress() as bar:
            task = bar.add_task("measuring", total=len(names) * len(chosen) * (1 + len(ways)))
            found = bench_tasks(
                lm, tokenizer, maker, ways, tasks=names, seeds=chosen, format=format, mode=mode, records=records,
                about={"model": model}, advance=lambda label: bar.update(task, advance=1, description=label),
            )  # fmt: skip
    show_result(found, tasks_report(found.rows, found.meta), out=out, json=json, records="prompts")


def _ways(
    reducer: str | None,
    keep: str | None,
    layer: str | None,
    prior: str | None,
    recipes: list[str],
    protect: str | None = None,
) -> dict[str, Recipe]:
    """What is compared, by what tables call it: every reducer at every keep, and recipes."""
    from quickmerge.merge.cache import Evictor
    from quickmerge.merge.place import Merge
    from quickmerge.merge.reducers import Reducer
    from quickmerge.merge.text.modes import Prefix
    from quickmerge.recipe import Recipe

    found: dict[str, Recipe] = {}
    for each in recipes:
        name = Path(each).absolute().name.removesuffix(Path(each).suffix) or each
        if name in found or name == "plain":
            raise QuickmergeError(f"--recipe must give each recipe a name of its own, got {name!r} for two ways")
        found[name] = load_recipe(each)
    if recipes and reducer is None:
        check_alone(recipes[0], given_names({"--keep": keep, "--layer": layer, "--prior": prior, "--protect": protect}))
        return found
    keeps, depth = parse_keeps(keep or KEEPS), parse_layer(layer)
    methods = [parse_method(name.strip(), keeps[0]) for name in (reducer or METHODS).split(",")]
    if prior is not None:
        methods.append(add_prior(parse_reducer("quickmerge", keeps[0]), prior))
    for share in keeps:
        for method in methods:
            # A prompt is reduced however short it is.
            with one_sentence():
                way: Reducer | Evictor = replace(method, keep=share)
                made = (
                    Recipe(cache=replace(way, protect=protect or way.protect))
                    if isinstance(way, Evictor)
                    else Recipe(merge=Merge(way, depth, Prefix(min_tokens=0, protect=protect)))
                )
            found[f"{method.label} {share:g}"] = made
    return found


def _range(option: str, text: str) -> range:
    """``"0:12"`` as the numbers from 0 to 11, ``"3"`` as 3 alone."""
    low, colon, high = text.partition(":")
    try:
        found = range(int(low), int(high) if colon else int(low) + 1)
    except ValueError:
        found = range(0)
    if not found or found.start < 0:
        raise QuickmergeError(f"{option} must be two numbers, the first one smaller (0:12), or one, got {text!r}")
    return found
