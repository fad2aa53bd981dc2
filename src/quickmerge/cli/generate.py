"""``quickmerge generate text`` and ``image``: answer a prompt by whatever makes that cheaper, alone or together.

Here capabilities meet: merging, a prior, multipole attention and drafted tokens, by options or by a recipe.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from quickmerge.calm.cli import is_calm
from quickmerge.cli.ask import ask_each, check_asked
from quickmerge.console.answers import print_answers
from quickmerge.console.options import (
    COMPARE,
    FEWER,
    JSON,
    LAYER,
    MAX_NEW_TOKENS,
    MIN_TOKENS,
    MODEL,
    PRIOR,
    RARE_DTYPE,
    RARE_PROTECT,
    RAW,
    SAMPLE,
    SAMPLE_SEED,
    TEMPERATURE,
    TOKENS,
    Alone,
    check_dtype,
    check_model,
    check_output,
    check_protect,
    check_text,
    load_writer,
    parse_layer,
    parse_question,
    parse_sampling,
    told_min_tokens,
    write_json,
)
from quickmerge.errors import QuickmergeError
from quickmerge.merge.cli.options import parse_budget, parse_cache, parse_reducer
from quickmerge.merge.cli.vlm import check_vlm, load_vlm
from quickmerge.multipole.cli import NAME as MULTIPOLE
from quickmerge.recipe.options import (
    ATTENTION,
    BUDGET,
    CACHE,
    DRAFTER,
    IMAGE_CACHE,
    KEEP,
    RECIPE,
    REDUCER,
    SAVE_RECIPE,
    SHARE,
    TREE,
    check_alone,
    check_folder,
    check_helpers,
    given_names,
    load_recipe,
    make_recipe,
    place,
    record,
    save_recipe,
    text_merge,
)
from quickmerge.speculative.cli import generate_drafter

if TYPE_CHECKING:
    from collections.abc import Callable

    from quickmerge.merge.bench.answer import Answer
    from quickmerge.recipe import Recipe
    from quickmerge.recipe.answer import RecipeAnswer

TEXT_EXAMPLE = 'Example: quickmerge generate text report.txt --prompt "Summarise." --keep 0.4 --compare'
IMAGE_EXAMPLE = 'Example: quickmerge generate image a.jpg --model runs/vlm --tokens 64 --prompt "What is it?"'
IMAGE_SHARE = 0.25
"""Of the visual tokens that is kept where nobody says."""


def text(
    file: Annotated[Path | None, typer.Argument(help="UTF-8 text that the prompt is about.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="What to ask; never reduced.")] = None,
    ask: Annotated[
        list[str] | None, typer.Option("--ask", help="In its place, once for each question: the file is read once.")
    ] = None,
    model: MODEL = "smollm2-135m",
    dtype: RARE_DTYPE = "float32",
    reducer: REDUCER = None,
    keep: KEEP = None,
    layer: LAYER = None,
    prior: PRIOR = None,
    min_tokens: MIN_TOKENS = None,
    protect: RARE_PROTECT = None,
    cache: CACHE = None,
    attention: ATTENTION = None,
    budget: BUDGET = None,
    drafter: DRAFTER = None,
    tree: TREE = None,
    recipe: RECIPE = None,
    max_new_tokens: MAX_NEW_TOKENS = 128,
    sample: SAMPLE = False,
    temperature: TEMPERATURE = None,
    seed: SAMPLE_SEED = 0,
    compare: COMPARE = False,
    raw: RAW = False,
    json: JSON = None,
    save: SAVE_RECIPE = None,
) -> None:
    """Answer prompts about a document by fewer tokens, or tokens that cost less, or all of it together."""
    from quickmerge.models.chat import question

    if is_calm(model):
        raise QuickmergeError(f"{model} is a CALM: let it write with quickmerge generate calm")
    sample, temperature = parse_sampling(sample, temperature, seed)
    check_dtype(dtype)
    merging = {"--reducer": reducer, "--keep": keep, "--layer": layer, "--prior": prior, "--min-tokens": min_tokens}
    check_protect(protect)
    cheaper = {"--cache": cache, "--attention": attention, "--budget": budget, "--drafter": drafter, "--tree": tree}
    merged = given_names(merging)
    check_alone(recipe, given_names({**merging, **cheaper, "--protect": protect}))
    check_helpers(attention, budget, drafter, tree)
    if protect is not None and cache is None and not merged and (attention, drafter) != (None, None):
        raise QuickmergeError("--protect is for tokens that are merged or leave the cache: give --keep or --cache too")
    check_folder(save)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "sample": sample, "temperature": temperature, "seed": seed
    }  # fmt: skip
    if ask:
        if prompt is not None:
            raise QuickmergeError("--prompt must be left out beside --ask, which asks one question after another")
        document = check_asked(file, ask)
        check_output(json)
        check_model(model, question(document, ask[0]))
        if set(merged) <= {"--keep"} and not given_names(cheaper) and recipe is None:
            # Nobody knows beforehand what will be asked.
            share = SHARE if keep is None else keep
            cache, keep, merged = f"kvzip:keep={share!r}", None, []
        made = _recipe(
            recipe, reducer, keep, layer, prior, min_tokens, cache, attention, budget, drafter, tree, merged, protect
        )
        ask_each(model, document, ask, made, settings, dtype=dtype, compare=compare, raw=raw, json=json)
        save_recipe(save, made)
        return
    if prompt is None:
        raise QuickmergeError("--prompt must say what to ask, or --ask each of several questions, got neither")

    if drafter is not None and attention is None and cache is None and not merged:

        def drafted(drafts: Any, nodes: int | str) -> dict[str, Any]:
            from quickmerge.recipe import Recipe, Speculation

            made = Recipe(decoding=Speculation(drafts, tree=nodes))
            save_recipe(save, made)
            return {} if json is None else record(made)

        generate_drafter(
            drafter,
            tree,
            file,
            prompt,
            model,
            dtype=dtype,
            **settings,
            compare=compare,
            raw=raw,
            json=json,
            record=drafted,
        )
        return
    check_output(json)
    depth = parse_layer(layer)
    document, prompt = parse_question(prompt, file)
    check_model(model, question(document, prompt))
    # what takes seconds to import comes after what can be told at once
    made = _recipe(
        recipe, reducer, keep, layer, prior, min_tokens, cache, attention, budget, drafter, tree, merged, protect
    )
    lm, tokenizer = load_writer(model, dtype)
    alone = Alone.writing(lm, tokenizer)
    if recipe is not None or drafter is not None or cache is not None or protect is not None:
        from quickmerge.recipe.answer import answer

        def by(way: Recipe | None) -> RecipeAnswer:
            return answer(lm, tokenizer, document, prompt, way, **settings)

        told = _answer(made, compare, by, raw=raw, alone=alone)
        extra: dict[str, Any] = {"prompt": prompt, "sample": sample, "temperature": temperature}
    else:
        told, extra = _merged(made, lm, tokenizer, document, prompt, depth, compare, raw, min_tokens, settings, alone)
    save_recipe(save, made)
    if json is not None:
        from quickmerge.models.precision import dtype_name

        write_json(json, {"model": model, "dtype": dtype_name(lm), **record(made), **extra, **told})


def _recipe(
    recipe: str | None, reducer: str | None, keep: float | None, layer: str | None, prior: str | None,
    min_tokens: int | None, cache: str | None, attention: str | None, budget: int | None, drafter: str | None,
    tree: str | None, merged: list[str], protect: str | None,
) -> Recipe:  # fmt: skip
    """The recipe that was named, or that options say; ``merged`` are those of merging that were given."""
    if recipe is not None:
        return load_recipe(recipe)
    merge = None
    if merged or (cache is None and attention is None and drafter is None):
        merge = text_merge(reducer, keep, parse_layer(layer), prior, min_tokens, protect)
    if merge is None and protect is not None:
        from dataclasses import replace

        evictor = parse_cache(cache)
        assert evictor is not None
        return make_recipe(
            cache=replace(evictor, protect=protect), attention=attention, budget=budget, drafter=drafter, tree=tree
        )
    return make_recipe(merge=merge, cache=cache, attention=attention, budget=budget, drafter=drafter, tree=tree)


def _squares(recipe: Recipe, vlm: Any) -> Recipe:
    """The recipe for a model whose visual tokens are squares of patches: all patches leave its tower, merged or not."""
    from dataclasses import replace

    from quickmerge.merge.place import Merge
    from quickmerge.models.vlm import find_vlm

    assert isinstance(recipe.tower, Merge)
    return recipe if find_vlm(vlm).encoder is not None else replace(recipe, tower=replace(recipe.tower, unmerge=True))


def _answer(
    recipe: Recipe, compare: bool, ask: Callable[[Any], RecipeAnswer], *, raw: bool, alone: Alone
) -> dict[str, Any]:
    """Answer by a recipe, and by the model alone where that is wanted; what both say, for JSON."""
    from quickmerge.recipe.answer import compared
    from quickmerge.terminal import Terminal

    found = print_answers(recipe, compare, ask, names=("recipe", "plain"), raw=raw, alone=alone)
    if compare:
        print(compared(found["recipe"], found["plain"]), file=Terminal(stderr=True).file)
    return {{"recipe": "by_recipe"}.get(name, name): each.as_dict() for name, each in found.items()}


def _merged(
    recipe: Recipe, lm: Any, tokenizer: Any, document: str, prompt: str, depth: Any, compare: bool, raw: bool,
    min_tokens: int | None, writing: dict[str, Any], alone: Alone,
) -> tuple[dict[str, Any], dict[str, Any]]:  # fmt: skip
    """Answer with fewer tokens, with multipole attention, or both."""
    from quickmerge.merge.bench.answer import answer
    from quickmerge.merge.place import Merge
    from quickmerge.multipole import multipole

    settings = recipe.attention
    method = recipe.merge.reducer if isinstance(recipe.merge, Merge) else None

    def ask(way: Any) -> Answer:
        return answer(
            lm, tokenizer, document, prompt, None if way is None else method, depth,
            attention=None if way is None or settings is None else multipole(lm, settings), **writing,
            **told_min_tokens(min_tokens),
        )  # fmt: skip

    results = print_answers(
        settings or method, compare, ask, lambda found: None if settings is None else str(found.attention),
        ("reduced" if settings is None else MULTIPOLE, "full"), raw=raw, alone=alone,
    )  # fmt: skip
    extra = {
        **({} if settings is None else {"attention": settings.label}),
        "reducer": None if method is None else method.label, "keep": None if method is None else method.keep,
        "prompt": prompt,
    }  # fmt: skip
    return {name: found.as_dict() for name, found in results.items()}, extra


def image(
    image: Annotated[list[Path], typer.Argument(help="Images that the prompt is about.", metavar="FILES")],
    prompt: Annotated[str, typer.Option("--prompt", help="What to ask; never reduced.")],
    model: Annotated[str, typer.Option("--model", help="A vision-language model: a folder or a Hugging Face id.")],
    dtype: RARE_DTYPE = "float32",
    reducer: Annotated[
        str | None,
        typer.Option("--reducer", help="See quickmerge ls; settings follow. Default: scope.", rich_help_panel=FEWER),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(
            "--keep",
            help=f"Share of the visual tokens kept, in (0, 1]. Default: {IMAGE_SHARE:g}.",
            rich_help_panel=FEWER,
        ),
    ] = None,
    tokens: TOKENS = None,
    layer: LAYER = None,
    text_keep: Annotated[
        float | None,
        typer.Option(
            "--text-keep", help="Share of all tokens kept higher up in the language model.", rich_help_panel=FEWER
        ),
    ] = None,
    min_tokens: MIN_TOKENS = None,
    tower_keep: Annotated[
        float | None,
        typer.Option("--tower-keep", help="Share of patches kept inside the vision tower.", rich_help_panel=FEWER),
    ] = None,
    cache: IMAGE_CACHE = None,
    attention: ATTENTION = None,
    budget: BUDGET = None,
    drafter: DRAFTER = None,
    tree: TREE = None,
    recipe: RECIPE = None,
    max_new_tokens: MAX_NEW_TOKENS = 128,
    sample: SAMPLE = False,
    temperature: TEMPERATURE = None,
    seed: SAMPLE_SEED = 0,
    compare: COMPARE = False,
    raw: RAW = False,
    json: JSON = None,
    save: SAVE_RECIPE = None,
) -> None:
    """Answer a prompt about images, which are read with fewer tokens, or tokens that cost less."""
    sample, temperature = parse_sampling(sample, temperature, seed)
    check_dtype(dtype)
    check_text("--prompt", prompt)
    merging = {"--reducer": reducer, "--keep": keep, "--tokens": tokens, "--layer": layer}
    cheaper = {
        "--text-keep": text_keep, "--min-tokens": min_tokens, "--tower-keep": tower_keep, "--cache": cache,
        "--attention": attention, "--budget": budget, "--drafter": drafter, "--tree": tree,
    }  # fmt: skip
    check_alone(recipe, given_names({**merging, **cheaper}))
    check_helpers(attention, budget, drafter, tree)
    if min_tokens is not None and text_keep is None:
        raise QuickmergeError("--min-tokens is for all tokens of the prompt: give --text-keep too")
    check_output(json)
    check_folder(save)
    check_vlm(model, len(image), prompt)
    # what takes seconds to import comes after what can be told at once
    from quickmerge.datasets.images import open_image
    from quickmerge.merge.bench.answer import answer_images as answer_reduced
    from quickmerge.merge.bench.answer import clamped
    from quickmerge.models.precision import dtype_name
    from quickmerge.recipe.answer import answer_images

    made, method, depth = load_recipe(recipe) if recipe is not None else None, None, None
    if made is None:
        if given_names(merging) or not given_names(cheaper):
            method = parse_reducer(reducer or "scope", parse_budget(keep, tokens, IMAGE_SHARE), "visual")
            depth = parse_layer(layer)
        words = None if text_keep is None else place(parse_reducer("quickmerge", text_keep), None, min_tokens)
        patches = None if tower_keep is None else place(parse_reducer("tome", tower_keep, "vision"), None, None)
        made = make_recipe(
            tower=patches, merge=words, visual=None if method is None else place(method, depth, None),
            cache=cache, attention=attention, budget=budget, drafter=drafter, tree=tree,
        )  # fmt: skip
    pictures = [open_image(path) for path in image]
    vlm, processor = load_vlm(model, dtype)
    made = made if tower_keep is None else _squares(made, vlm)
    alone = Alone.asked(vlm, processor, pictures[0])
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "sample": sample, "temperature": temperature, "seed": seed
    }  # fmt: skip
    extra: dict[str, Any] = {"prompt": prompt, "images": [path.name for path in image]}
    if method is None or given_names(cheaper):
        told = _answer(
            made, compare, lambda way: answer_images(vlm, processor, pictures, prompt, way, **settings), raw=raw,
            alone=alone,
        )  # fmt: skip
    else:
        results = print_answers(
            method, compare, lambda way: answer_reduced(vlm, processor, pictures, prompt, way, depth, **settings),
            lambda found: None if tokens is None else clamped(tokens, found.visual), raw=raw, alone=alone,
        )  # fmt: skip
        told = {name: found.as_dict() for name, found in results.items()}
        extra = {"reducer": method.label, "keep": keep, "tokens": tokens, **extra}
    save_recipe(save, made)
    if json is not None:
        write_json(json, {"model": model, "dtype": dtype_name(vlm), **record(made), **extra, **told})
