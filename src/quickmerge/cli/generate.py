"""``quickmerge generate text``: answer a prompt about a document by whatever makes that cheaper, alone or together.

Here capabilities meet: merging, a prior, multipole attention and drafted tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.calm.cli import is_calm
from quickmerge.console.answers import print_answers
from quickmerge.console.options import (
    CHEAPER,
    COMPARE,
    FEWER,
    JSON,
    LAYER,
    MAX_NEW_TOKENS,
    MIN_TOKENS,
    MODEL,
    PRIOR,
    RAW,
    SAMPLE,
    SAMPLE_SEED,
    TEMPERATURE,
    Alone,
    check_model,
    check_output,
    load_writer,
    parse_layer,
    parse_question,
    parse_sampling,
    told_min_tokens,
    write_json,
)
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.options import add_prior, parse_reducer
from quickmerge.multipole.cli import NAME as MULTIPOLE
from quickmerge.multipole.cli import parse_attention
from quickmerge.speculative.cli import generate_drafter

if TYPE_CHECKING:
    from quickmerge.merge.bench.answer import Answer
    from quickmerge.merge.reducers import Reducer

TEXT_EXAMPLE = (
    'Example: quickmerge generate text report.txt --prompt "Summarise." --keep 0.4 --compare; '
    'quickmerge generate text report.txt --prompt "Summarise." --drafter lookup'
)
SHARE = 0.4
"""Of the tokens that is kept where nobody says."""


def text(
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask; never reduced.")],
    file: Annotated[Path | None, typer.Argument(help="UTF-8 text that the prompt is about.")] = None,
    model: MODEL = "smollm2-135m",
    reducer: Annotated[
        str | None,
        typer.Option(
            "--reducer", help="See quickmerge ls; settings follow. Default: quickmerge.", rich_help_panel=FEWER
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help=f"Share of the tokens kept, in (0, 1]. Default: {SHARE:g}.", rich_help_panel=FEWER),
    ] = None,
    layer: LAYER = None,
    prior: PRIOR = None,
    min_tokens: MIN_TOKENS = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            help="multipole: read the past by its clusters; settings follow.",
            rich_help_panel=CHEAPER,
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(
            "--budget",
            min=0,
            help="Tokens of clusters read exactly. Default: 512.",
            rich_help_panel=CHEAPER,
        ),
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            help="lookup, smollm2-135m (its heads), or a folder of train gumiho.",
            rich_help_panel=CHEAPER,
        ),
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            "--tree", help="Drafted tokens that a pass reads: a number. Default: auto.", rich_help_panel=CHEAPER
        ),
    ] = None,
    max_new_tokens: MAX_NEW_TOKENS = 128,
    sample: SAMPLE = False,
    temperature: TEMPERATURE = None,
    seed: SAMPLE_SEED = 0,
    compare: COMPARE = False,
    raw: RAW = False,
    json: JSON = None,
) -> None:
    """Answer a prompt about a document: with fewer tokens, or tokens that cost less (--attention, --drafter)."""
    from quickmerge.models.chat import question

    if is_calm(model):
        raise QuickmergeError(f"{model} is a CALM: let it write with quickmerge generate calm")
    sample, temperature = parse_sampling(sample, temperature, seed)
    merging = {"--reducer": reducer, "--keep": keep, "--layer": layer, "--prior": prior, "--min-tokens": min_tokens}
    merged = [option for option, value in merging.items() if value is not None]
    if drafter is not None:
        if merged or attention is not None:
            raise QuickmergeError(
                f"{(merged or ['--attention'])[0]} can't be used with --drafter, which reads every token: leave it out"
            )
        generate_drafter(
            drafter, tree, file, prompt, model, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature,
            seed=seed, compare=compare, raw=raw, json=json,
        )  # fmt: skip
        return
    if tree is not None:
        raise QuickmergeError("--tree is for drafted tokens: give --drafter too")
    if budget is not None and attention is None:
        raise QuickmergeError("--budget is for multipole attention: give --attention multipole too")
    check_output(json)
    depth = parse_layer(layer)
    document, prompt = parse_question(prompt, file)
    check_model(model, question(document, prompt))
    # what takes seconds to import comes after what can be told at once
    from quickmerge.merge.bench.answer import answer
    from quickmerge.multipole import multipole

    settings = None if attention is None else parse_attention(attention, budget)
    method: Reducer | None = None
    if settings is None or merged:
        method = parse_reducer(reducer or "quickmerge", SHARE if keep is None else keep)
        method = method if prior is None else add_prior(method, prior)
    lm, tokenizer = load_writer(model)

    def ask(way: Any) -> Answer:
        return answer(
            lm, tokenizer, document, prompt, None if way is None else method, depth,
            attention=None if way is None or settings is None else multipole(lm, settings),
            max_new_tokens=max_new_tokens, sample=sample, temperature=temperature, seed=seed,
            **told_min_tokens(min_tokens),
        )  # fmt: skip

    results = print_answers(
        settings or method, compare, ask, lambda found: None if settings is None else str(found.attention),
        ("reduced" if settings is None else MULTIPOLE, "full"), raw=raw, alone=Alone.writing(lm, tokenizer),
    )  # fmt: skip
    write_json(json, {
        "model": model, **({} if settings is None else {"attention": settings.label}),
        "reducer": None if method is None else method.label, "keep": None if method is None else method.keep,
        "prompt": prompt, **{name: found.as_dict() for name, found in results.items()},
    })  # fmt: skip
