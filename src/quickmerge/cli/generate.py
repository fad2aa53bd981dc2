"""``quickmerge generate``: answer a prompt about a document with fewer tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickmerge.console.answers import print_answers
from quickmerge.console.options import (
    JSON,
    LAYER,
    MIN_TOKENS,
    PRIOR,
    RAW,
    TOKENS,
    Alone,
    check_model,
    check_output,
    load_writer,
    parse_layer,
    parse_question,
    told_min_tokens,
    write_json,
)
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.options import add_prior, parse_reducer

EXAMPLE = (
    'Example: quickmerge generate --file report.txt --prompt "Summarise." --keep 0.4 --compare; '
    'quickmerge generate --image photo.jpg --model runs/vlm --reducer scope --tokens 64 --prompt "What is this?"; '
    'quickmerge generate --drafter lookup --file report.txt --prompt "Summarise." --compare; '
    'quickmerge generate --attention multipole --budget 512 --file report.txt --prompt "Summarise." --compare; '
    'quickmerge generate --model runs/calm --prompt "The sea" --temperature 0.5'
)


def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask; never reduced.")],
    file: Annotated[Path | None, typer.Option("--file", help="UTF-8 text that the prompt is about.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Image that the prompt is about instead; give several.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="A folder, a Hugging Face id, or the default smollm2-135m, which sees no images."),
    ] = None,
    reducer: Annotated[
        str | None,
        typer.Option(
            "--reducer",
            help="See quickmerge ls; settings may follow: quickmerge:recency=0.5. Default: quickmerge, or scope.",
        ),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option("--keep", help="Share of the tokens that is kept, in (0, 1]. Default: 0.4, of images 0.25."),
    ] = None,
    tokens: TOKENS = None,
    layer: LAYER = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1)] = 128,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of greedy decoding.")] = False,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="Sample at this temperature; 0 is greedy decoding.")
    ] = None,
    temperature_method: Annotated[
        str | None,
        typer.Option(
            "--temperature-method",
            help="A CALM has no probabilities to sharpen: exact (the default) draws until draws agree, batch:200 "
            "chooses among so many.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="For --sample.")] = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with all tokens too.")] = False,
    drafter: Annotated[
        str | None,
        typer.Option(
            "--drafter",
            help="Read everything, and write several tokens a step: lookup, or a folder of "
            "train gumiho. The text stays the model's own.",
        ),
    ] = None,
    tree: Annotated[
        str | None, typer.Option("--tree", help="Drafted tokens that a step reads: auto (the default) or a number.")
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            "--attention",
            help="multipole: new tokens read a long document by its clusters. Settings may follow: "
            "multipole:ratio=0.125. Tokens are merged too if --reducer or --keep is given.",
        ),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option("--budget", min=0, help="With --attention: tokens of the clusters that are read exactly. 512."),
    ] = None,
    prior: PRIOR = None,
    min_tokens: MIN_TOKENS = None,
    raw: RAW = False,
    json: JSON = None,
) -> None:
    """Answer a prompt about a document or about images, which are read with fewer tokens."""
    from quickmerge.calm.cli import generate_calm, is_calm
    from quickmerge.models.chat import question

    if is_calm(model):
        _without("a CALM", {
            "--image": image or None, "--reducer": reducer, "--keep": keep, "--tokens": tokens, "--layer": layer,
            "--prior": prior, "--min-tokens": min_tokens, "--attention": attention, "--budget": budget,
            "--drafter": drafter, "--tree": tree,
            "--compare": compare or None,
        })  # fmt: skip
        generate_calm(
            str(model), file, prompt, max_new_tokens=max_new_tokens, temperature=temperature, method=temperature_method,
            seed=seed, raw=raw, json=json,
        )  # fmt: skip
        return
    if temperature_method is not None:
        raise QuickmergeError("--temperature-method is for a CALM: give the folder of one as --model")
    if sample and temperature == 0:
        raise QuickmergeError("--temperature must be above 0 with --sample, got 0")
    if temperature:
        from quickmerge.models.generation import check_temperature

        check_temperature("--temperature", temperature)
    if not -(2**63) <= seed < 2**63:
        raise QuickmergeError(f"--seed must be a whole number of 64 bits, got {seed}")
    sample, temperature = sample or bool(temperature), temperature or None
    if drafter is not None:
        from quickmerge.speculative.cli import generate_drafter

        _without("--drafter", {
            "--image": image or None, "--reducer": reducer, "--keep": keep, "--tokens": tokens, "--layer": layer,
            "--prior": prior, "--min-tokens": min_tokens, "--attention": attention, "--budget": budget,
        })  # fmt: skip
        generate_drafter(
            drafter, tree, file, prompt, model, max_new_tokens=max_new_tokens, sample=sample, temperature=temperature,
            seed=seed, compare=compare, raw=raw, json=json,
        )  # fmt: skip
        return
    if tree is not None:
        raise QuickmergeError("--tree is for drafted tokens: give --drafter too")
    if image:
        from quickmerge.merge.cli.vlm import generate_image

        _without("--image", {
            "--file": file, "--prior": prior, "--min-tokens": min_tokens, "--attention": attention, "--budget": budget,
        })  # fmt: skip
        generate_image(
            image, prompt, model, reducer or "scope", keep, tokens, layer, max_new_tokens=max_new_tokens, sample=sample,
            temperature=temperature, seed=seed, compare=compare, raw=raw, json=json,
        )  # fmt: skip
        return
    if tokens is not None:
        raise QuickmergeError("--tokens is for images: give --image too, or --keep in its place")
    if attention is not None:
        from quickmerge.cli.generate_multipole import generate_multipole

        generate_multipole(
            attention, budget, file, prompt, model, reducer, keep, layer, prior, min_tokens,
            max_new_tokens=max_new_tokens, sample=sample, temperature=temperature, seed=seed, compare=compare, raw=raw,
            json=json,
        )  # fmt: skip
        return
    if budget is not None:
        raise QuickmergeError("--budget is for multipole attention: give --attention multipole too")
    model = "smollm2-135m" if model is None else model
    reducer, keep = reducer or "quickmerge", 0.4 if keep is None else keep
    check_output(json)
    depth = parse_layer(layer)
    document, prompt = parse_question(prompt, file)
    check_model(model, question(document, prompt))
    # what takes seconds to import comes after what can be told at once
    from quickmerge.merge.bench.answer import answer

    method = parse_reducer(reducer, keep)
    method = method if prior is None else add_prior(method, prior)
    lm, tokenizer = load_writer(model)
    results = print_answers(
        method, compare,
        lambda way: answer(
            lm, tokenizer, document, prompt, way, depth, max_new_tokens=max_new_tokens, sample=sample,
            temperature=temperature, seed=seed, **told_min_tokens(min_tokens),
        ), raw=raw, alone=Alone.writing(lm, tokenizer),
    )  # fmt: skip
    write_json(json, {
        "model": model, "reducer": method.label, "keep": keep, "prompt": prompt,
        **{name: found.as_dict() for name, found in results.items()},
    })  # fmt: skip


def _without(option: str, given: dict[str, object]) -> None:
    """Raise if something was given that has no meaning with an option."""
    for name, value in given.items():
        if value is not None:
            raise QuickmergeError(f"{name} has no meaning with {option}: leave it out")
