"""``quickmerge batch``: answer a file of prompts on Ray, by a recipe."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.calm.cli import is_calm
from quickmerge.console.options import (
    LAYER,
    MAX_NEW_TOKENS,
    MIN_TOKENS,
    MODEL,
    PRIOR,
    SAMPLE,
    SAMPLE_SEED,
    TEMPERATURE,
    WRITING,
    check_model,
    check_text,
    one_sentence,
    parse_layer,
    parse_sampling,
    progress,
    quiet,
)
from quickmerge.errors import QuickmergeError, near_match
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
from quickmerge.serve.batch.job import SAVE_SECONDS, Cluster, Progress, need_ray, run_job, try_out
from quickmerge.serve.batch.rows import Columns, Row, read_rows
from quickmerge.serve.batch.store import ERRORS, FORMATS, Store, check_folder

if TYPE_CHECKING:
    from quickmerge.recipe import Recipe

EXAMPLE = "Example: quickmerge batch --input prompts.jsonl --recipe runs/recipe --out runs/answers --workers 2"
SOME_FAILED = 3
"""The exit code where all is done but some rows can't be answered."""
MODES, DTYPES, DEVICES = ("chat", "completion"), ("float32", "bfloat16", "float16"), ("cpu", "cuda")

MACHINES = "Machines"


def _rare(option: Any) -> Any:
    """An option of other commands, which here --help-all alone shows."""
    info = copy(option.__metadata__[0])
    info.hidden = True
    return Annotated[option.__origin__, info]


if TYPE_CHECKING:
    from quickmerge.console.options import LAYER as _RARE_LAYER
    from quickmerge.console.options import MIN_TOKENS as _RARE_MIN_TOKENS
    from quickmerge.console.options import PRIOR as _RARE_PRIOR
    from quickmerge.console.options import SAMPLE_SEED as _RARE_SEED
    from quickmerge.recipe.options import ATTENTION as _RARE_ATTENTION
    from quickmerge.recipe.options import DRAFTER as _RARE_DRAFTER
else:
    _RARE_LAYER, _RARE_PRIOR, _RARE_MIN_TOKENS = _rare(LAYER), _rare(PRIOR), _rare(MIN_TOKENS)
    _RARE_ATTENTION, _RARE_DRAFTER, _RARE_SEED = _rare(ATTENTION), _rare(DRAFTER), _rare(SAMPLE_SEED)


def batch(
    input: Annotated[
        Path, typer.Option("--input", help="A .jsonl or .parquet file, a dataset saved to disk, or a folder of texts.")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder for the results; a job that was stopped goes on there.")],
    model: MODEL = "smollm2-135m",
    column: Annotated[
        str | None,
        typer.Option("--column", help="Where a prompt stands: a text, or messages. Default: prompt, ..."),
    ] = None,
    question: Annotated[
        str | None,
        typer.Option("--question", help="Column of a question about the text in --column."),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="One question about each text, never reduced."),
    ] = None,
    id: Annotated[str | None, typer.Option("--id", help="Column of the rows' names. Default: id.", hidden=True)] = None,
    mode: Annotated[str, typer.Option("--mode", help="chat: by the chat template; completion.")] = MODES[0],
    reducer: REDUCER = None,
    keep: KEEP = None,
    layer: _RARE_LAYER = None,
    prior: _RARE_PRIOR = None,
    min_tokens: _RARE_MIN_TOKENS = None,
    cache: CACHE = None,
    attention: _RARE_ATTENTION = None,
    budget: BUDGET = None,
    drafter: _RARE_DRAFTER = None,
    tree: TREE = None,
    recipe: RECIPE = None,
    max_new_tokens: MAX_NEW_TOKENS = 128,
    sample: SAMPLE = False,
    temperature: TEMPERATURE = None,
    seed: _RARE_SEED = 0,
    format: Annotated[
        str, typer.Option("--format", help="Of the results: parquet or jsonl.", rich_help_panel=WRITING)
    ] = FORMATS[0],
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes with a model each.", rich_help_panel=MACHINES)
    ] = 1,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows a worker answers at once.", rich_help_panel=MACHINES)
    ] = 8,
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", help="Of a Ray cluster: auto or host:port.", rich_help_panel=MACHINES),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="Of the workers: cpu or cuda.", rich_help_panel=MACHINES)
    ] = DEVICES[0],
    dtype: Annotated[
        str,
        typer.Option("--dtype", help=f"Of the weights: {', '.join(DTYPES)}.", rich_help_panel=MACHINES, hidden=True),
    ] = DTYPES[0],
    cpus: Annotated[
        int | None, typer.Option("--cpus", min=1, help="Cores of a worker.", rich_help_panel=MACHINES, hidden=True)
    ] = None,
    save_seconds: Annotated[
        float,
        typer.Option(
            "--save-seconds",
            min=0,
            metavar="S",
            help="Between two parts of the results.",
            rich_help_panel=MACHINES,
            hidden=True,
        ),
    ] = SAVE_SECONDS,
) -> None:
    """Answer many prompts on Ray, here or on a cluster; stopped or killed, the same command goes on."""
    sample, temperature = parse_sampling(sample, temperature, seed)
    for option, given, allowed in (
        ("--mode", mode, MODES), ("--format", format, FORMATS), ("--dtype", dtype, DTYPES),
        ("--device", device, DEVICES),
    ):  # fmt: skip
        if given not in allowed:
            raise QuickmergeError(
                f"{option} must be one of {', '.join(allowed)}, got {given!r}{near_match(given, allowed)}"
            )
    if prompt is not None:
        check_text("--prompt", prompt)
        if question is not None:
            raise QuickmergeError("--prompt must be left out beside --question, which is a question for each row")
    if is_calm(model):
        raise QuickmergeError(f"{model} is a CALM: let it write with quickmerge generate calm")
    merging = {"--reducer": reducer, "--keep": keep, "--layer": layer, "--prior": prior, "--min-tokens": min_tokens}
    cheaper = {"--cache": cache, "--attention": attention, "--budget": budget, "--drafter": drafter, "--tree": tree}
    check_alone(recipe, given_names({**merging, **cheaper}))
    check_helpers(attention, budget, drafter, tree)
    check_folder(out)
    rows = read_rows(input, Columns(column, question, prompt, id))
    need_ray()
    check_model(model)
    if recipe is not None:
        made = load_recipe(recipe)
    else:
        merge = None
        if given_names(merging) or (cache is None and attention is None and drafter is None):
            merge = text_merge(reducer, keep, parse_layer(layer), prior, min_tokens)
        made = make_recipe(merge=merge, cache=cache, attention=attention, budget=budget, drafter=drafter, tree=tree)
    cluster = Cluster(workers, ray_address, cpus, 1 if device == "cuda" else 0)
    known = str(Path(model).resolve()) if Path(model).is_dir() else model
    _go(
        rows, out, made, cluster, {"batch": batch_size, "save_seconds": save_seconds}, model=known, mode=mode,
        documents=question is not None or prompt is not None, max_new_tokens=max_new_tokens, sample=sample,
        temperature=temperature, seed=seed, dtype=dtype, device=device, format=format,
    )  # fmt: skip


def _go(
    rows: list[Row], out: Path, recipe: Recipe, cluster: Cluster, pace: dict[str, Any], *, format: str, **told: Any
) -> None:
    """Do what is left of the job, with a lock on its folder, and tell how it ended."""
    from quickmerge.locks import sole_writer
    from quickmerge.serve.batch.writer import WriterSettings
    from quickmerge.terminal import say

    quiet()
    settings = WriterSettings(recipe=recipe, threads=cluster.threads, **told)
    with sole_writer(out):
        with one_sentence():
            found = try_out(settings, cluster)
        for sentence in found.notes:
            say(sentence)
        given = {name: value for name, value in told.items() if name not in ("dtype", "device")}
        identity = {**given, "format": format, "dtype": settings.dtype, "weights": found.weights, **_told(recipe)}
        store = Store(out, identity, {"versions": _versions()})
        done = store.done(rows)
        left = [row for row in rows if row.index not in done]
        if done:
            say(f"{len(done):,} of {len(rows):,} rows are done already: going on with {len(left):,}")
        if left:
            _watched(left, len(rows), settings, store, cluster, pace)
        _tell_end(store, out, format)
    if store.errors:
        raise typer.Exit(SOME_FAILED)


def _watched(left: list[Row], total: int, settings: Any, store: Store, cluster: Cluster, pace: dict[str, Any]) -> None:
    """Run the job below a bar that says how far it is, and say how to go on where it is interrupted."""
    from quickmerge.terminal import say

    with progress() as bar:
        task = bar.add_task("starting workers", total=total, completed=total - len(left))

        def tell(now: Progress) -> None:
            words = "starting workers"
            if now.rows:
                words = (
                    f"{now.rate:.1f} rows/s, {now.tokens_read:,} tokens read, {now.tokens_kept:,.0f} kept, "
                    f"{now.errors} errors"
                )
            bar.update(task, completed=total - len(left) + now.rows + now.errors, description=words)

        try:
            run_job(left, settings, store, cluster, **pace, tell=tell)
        except (KeyboardInterrupt, SystemExit):
            done = len(store.errors) + int(store.totals()["rows"])
            say(f"stopped after {done:,} of {total:,} rows: the same command goes on from there")
            raise


def _tell_end(store: Store, out: Path, format: str) -> None:
    sums = store.totals()
    read, kept = sums["tokens_read"], sums["tokens_kept"]
    print(f"{sums['rows']:,.0f} rows answered: {out / f'results-*.{format}'}")
    if read:
        print(
            f"{read:,.0f} tokens read, {kept:,.0f} kept in the cache of a layer ({kept / read:.0%}), "
            f"{sums['tokens_written']:,.0f} written"
        )
    if store.errors:
        print(f"{len(store.errors):,} rows can't be answered: {out / ERRORS} says why")


def _told(recipe: Recipe) -> dict[str, Any]:
    """The recipe as the manifest holds it; that another version wrote it down is no other recipe."""
    from quickmerge.recipe.options import record

    told = record(recipe)
    told["recipe"].pop("quickmerge", None)
    return told


def _versions() -> dict[str, str]:
    """Of what computes the results; noted, and not compared."""
    from importlib.metadata import version

    from quickmerge._version import __version__

    return {"quickmerge": __version__, **{name: version(name) for name in ("ray", "torch", "transformers")}}
