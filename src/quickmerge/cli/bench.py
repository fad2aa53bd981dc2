"""``quickmerge bench``: quality beside cost for several reducers on your documents or images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from quickmerge.calm.cli import has_calm
from quickmerge.console.options import (
    JSON,
    LAYER,
    PRIOR,
    Alone,
    check_output,
    load_writer,
    one_sentence,
    parse_keeps,
    parse_layer,
    progress,
    read_text,
    write_json,
)
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.merge.cli.options import add_prior, parse_reducer

EXAMPLE = (
    "Example: quickmerge bench --text a.txt b.txt --reducer quickmerge,tome,random --keep 0.2,0.42 --json out.json; "
    "quickmerge bench --drafter runs/gumiho,lookup --temperature 0,1; "
    "quickmerge bench --model runs/calm,runs/discrete --text held_out/*.txt"
)


DRAFTER_OPTIONS = ("drafter", "model", "prompts", "tree", "temperature", "max_new_tokens", "limit", "out", "json")
"""What can be said with --drafter."""

CALM_OPTIONS = (
    "text", "more", "model", "context", "limit", "rounds", "samples", "batch", "temperature", "max_new_tokens", "out",
    "json",
)  # fmt: skip
"""What can be said with a CALM."""


def bench(
    context_: typer.Context,
    text: Annotated[
        list[Path] | None, typer.Option("--text", help="UTF-8 files of at least 1,000 tokens; give several.")
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further files after --text.", show_default=False)] = None,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image",
            help="A folder of images instead; with a folder for each class, labels are checked, and for a "
            "vision-language model, with annotations.jsonl, answers.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="A folder, a Hugging Face id, or the default: smollm2-135m, vit-small-14 to see. With a folder of "
            "train calm, several with commas, and ordinary language models of its tokenizer.",
        ),
    ] = None,
    reducer: Annotated[
        str,
        typer.Option(
            "--reducer", help="Names with commas; see quickmerge ls. Settings may follow: quickmerge:recency=0.5."
        ),
    ] = "quickmerge,random",
    keep: Annotated[
        str | None,
        typer.Option(
            "--keep",
            help="Shares with commas: of the tokens (0.2,0.42,0.6), of images the compute (0.5,0.7), or with a "
            "vision-language model the visual tokens (0.5,0.25,0.11).",
        ),
    ] = None,
    layer: LAYER = None,
    context: Annotated[
        int, typer.Option("--context", help="Tokens of context per document; CALMs: of a window, 256 unless given.")
    ] = 1024,
    target: Annotated[int, typer.Option("--target", help="Tokens of continuation that are scored.")] = 192,
    out: Annotated[Path | None, typer.Option("--out", help="Write report.html here (a folder).")] = None,
    prior: PRIOR = None,
    limit: Annotated[
        int,
        typer.Option(
            "--limit",
            min=1,
            help="Images to read, evenly taken from the folder; or prompts; or places of texts, 2,000 unless given.",
        ),
    ] = 64,
    rounds: Annotated[
        int, typer.Option("--rounds", min=2, help="Images and CALMs: how often the methods take turns.")
    ] = 5,
    dynamicvit: Annotated[
        Path | None, typer.Option("--dynamicvit", help="Images: measure this folder of train dynamicvit too.")
    ] = None,
    drafter: Annotated[
        str | None,
        typer.Option("--drafter", help="Measure drafters instead: lookup and folders of train gumiho, with commas."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Drafters: a prompt a line, or .jsonl with prompt and kind. Default: a dozen "
            "about the shipped document.",
        ),
    ] = None,
    tree: Annotated[str | None, typer.Option("--tree", help="Drafters: nodes a step reads, auto or a number.")] = None,
    temperature: Annotated[
        str | None,
        typer.Option(
            "--temperature",
            help="With commas. Drafters: 0 is greedy, the default. CALMs: measure sampling at these, in (0, 1].",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=2, help="Drafters and CALMs: of a text. Default: 128.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", min=2, help="CALMs: draws at each place. Default: 16.")
    ] = None,
    batch: Annotated[
        str | None, typer.Option("--batch", help="CALMs: texts written at a time, with commas. Default: 1,8,32.")
    ] = None,
    json: JSON = None,
) -> None:
    """Quality and cost of every reducer at every keep, timed interleaved.

    For texts that is context recovery on the same target tokens; for images fidelity to the features of the model as it
    is, and labels where the folder has one for each class and the model a head for them. For a vision-language model
    that is answers to the questions of ``annotations.jsonl``, right to the letter, by kind of question. For drafters it
    is tokens for each pass of the model, and speed beside plain decoding. For CALMs (train calm) it is BrierLM, which
    draws alone tell, operations for a token, and tokens a second, beside ordinary language models.
    """
    if drafter is not None:
        from quickmerge.speculative.cli import bench_drafter

        _only(context_, DRAFTER_OPTIONS, "--drafter")
        bench_drafter(
            drafter, model, prompts, tree, temperature or "0", max_new_tokens or 128, limit, out, json
        )  # fmt: skip
        return
    if has_calm(model):
        from quickmerge.calm.cli import bench_calm

        assert model is not None
        _only(context_, CALM_OPTIONS, "a CALM")
        bench_calm(
            model, [*(text or []), *(more or [])], length=context if _said(context_, "context") else 256,
            limit=limit if _said(context_, "limit") else 2000, samples=samples or 16,
            batches="1,8,32" if batch is None else batch, new=max_new_tokens or 128, rounds=rounds,
            temperature=temperature, out=out, json=json,
        )  # fmt: skip
        return
    if samples is not None or batch is not None:
        raise QuickmergeError(f"{'--samples' if batch is None else '--batch'} is for CALMs: give the folder of one")
    theirs: dict[str, object] = {
        "--prompts": prompts, "--tree": tree, "--temperature": temperature, "--max-new-tokens": max_new_tokens,
    }  # fmt: skip
    if said := [name for name, value in theirs.items() if value is not None]:
        raise QuickmergeError(f"{said[0]} is for drafters: give --drafter too")
    if (image is None) == (not text):
        raise QuickmergeError("give either --text or --image, or --drafter, got " + ("both" if image else "neither"))
    if image is not None:
        from quickmerge.merge.cli.bench import bench_images

        for name, value in {"--prior": prior, "--layer": layer, "further files": more}.items():
            if value is not None:
                raise QuickmergeError(f"{name} can't be used with --image: leave it out")
        bench_images(
            image, "vit-small-14" if model is None else model, reducer, keep, limit, rounds, dynamicvit, out, json
        )
        return
    from quickmerge.bench.environment import environment
    from quickmerge.datasets.text import LEAST, split_document
    from quickmerge.merge.bench.text import bench as measure
    from quickmerge.merge.bench.text import bench_report, bench_table
    from quickmerge.terminal import Terminal
    from quickmerge.viz.page import write_page

    check_output(json, out / "report.html" if out is not None else None)
    model, keeps = "smollm2-135m" if model is None else model, parse_keeps(keep or "0.2,0.42,0.6")
    methods = [parse_reducer(name.strip(), keeps[0]) for name in reducer.split(",")]
    if prior is not None:
        methods.append(add_prior(parse_reducer("quickmerge", keeps[0]), prior))
    depth = parse_layer(layer)
    paths = [*(text or []), *(more or [])]
    # no token that matters stands further on, see split_document
    texts = [read_text(path, first=256 * (context + target + LEAST)) for path in paths]
    lm, tokenizer = load_writer(model)
    # Documents sorted into several folders are told apart by the folder's name in the tables.
    parents = [path.absolute().parent.name for path in paths]
    kinds = parents if len(set(parents)) > 1 else [None] * len(paths)
    alone = Alone.writing(lm, tokenizer)
    with one_sentence(alone):
        documents = [
            # Folder and file name say which document it was, without where this machine keeps it.
            split_document(
                tokenizer, body, "/".join(path.absolute().parts[-2:]), context=context, target=target, kind=kind
            )
            for path, body, kind in zip(paths, texts, kinds, strict=True)
        ]
    with progress() as bar, one_sentence(alone):
        task = bar.add_task("measuring", total=len(documents) * (1 + len(methods) * len(keeps)))

        def advance(label: str) -> None:
            bar.update(task, advance=1, description=Path(label).name)

        rows, records = measure(lm, documents, methods, keeps, layer=depth, advance=advance)
    meta = {
        "model": model, "context": context, "target": target, "layer": layer or "default",
        "documents": [document.name for document in documents], "environment": environment(),
        "reducers": {m.label: repr(m) for m in methods},
    }  # fmt: skip
    write_json(json, {"rows": rows, "documents": records, "meta": meta})
    bench_table(rows, Terminal())
    if out is not None:
        write_page(out / "report.html", bench_report(rows, meta))
        print(f"wrote {clean_name(out / 'report.html')}")


def _said(context: typer.Context, name: str) -> bool:
    """Whether an option was given, and has not its default."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _only(context: typer.Context, allowed: tuple[str, ...], what: str) -> None:
    """Refuse options that would be passed over."""
    for name in context.params:
        if name not in allowed and _said(context, name):
            option = "further files" if name == "more" else "--" + name.replace("_", "-")
            raise QuickmergeError(f"{option} can't be used with {what}: leave it out")
