"""A transplant on the terminal: what was shared, how rules fared, what it cost on a text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from quickmerge.terminal import plain

if TYPE_CHECKING:
    from quickmerge.vocabulary.quality import TextQuality
    from quickmerge.vocabulary.report import Report

__all__ = ["print_quality", "print_transplant"]

SHOWN = 8
"""Rules that the table shows of each matrix; the JSON has all."""
COLUMNS = {
    "rule": "rule", "centred_cosine": "centred", "cosine": "cosine", "error": "error", "offset": "offset",
    "donor_residual": "donor", "weight_sum": "weights",
}  # fmt: skip
LEGEND = (
    "centred: cosine to the true row, both without the common mean (what is compared); error: relative; offset: along "
    "the mean row; donor: what is left of the donor's vector; weights: their sum and its spread."
)
MEANINGS = {
    "copied": "copied bit for bit", "special": "special, mapped", "rebuilt": "new, approximated",
    "restored": "restored from an earlier transplant", "alias": "never given by the tokenizer: mean row",
    "unmapped": "special, no counterpart: mean row", "padding": "without a token: mean row",
}  # fmt: skip


def print_transplant(report: Report, console: Console) -> None:
    """Print what was done."""
    table = Table("rows", "how many", title="The new vocabulary")
    for kind, count in report.counts.items():
        if count:
            table.add_row(MEANINGS[kind], f"{count:,}")
    table.add_row("all", f"{report.rows:,} (before: {report.base_rows:,})")
    console.print(table)
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
    table = Table("", "before", "after", title="On the text")
    old, new = quality.before.as_dict(), quality.after.as_dict()
    for key, words in (
        ("bits_per_byte", "bits per byte"), ("tokens_per_byte", "tokens per byte"), ("bits_per_shared_token",
        "bits per shared token"), ("bits_per_new_token", "bits per new token"),
    ):  # fmt: skip
        if old[key] is not None or new[key] is not None:
            table.add_row(words, *("" if one[key] is None else f"{one[key]:.3f}" for one in (old, new)))
    table.add_row("tokens", f"{old['tokens']:,}", f"{new['tokens']:,}")
    table.add_row("of them new", "", f"{new['new_tokens']:,} ({new['new_tokens'] / new['tokens']:.1%})")
    console.print(table)
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
        table = Table(
            box=SIMPLE,
            pad_edge=False,
            padding=(0, 1, 0, 0),
            title=f"{name}: {made['held_out']} shared tokens, hidden and rebuilt",
        )
        for key, words in COLUMNS.items():
            table.add_column(words, no_wrap=key == "rule", justify="left" if key == "rule" else "right")
        for row in rows:
            cells = [_cell(row[key]) for key in COLUMNS]
            if row["weight_sum_spread"]:
                cells[-1] = f"{row['weight_sum']:.2f}±{row['weight_sum_spread']:.2f}"
            table.add_row(*(plain(cell, "bold" if row["best"] else "") for cell in cells))
        console.print(table)
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

    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0), title="on the text, rows by one rule")
    table.add_column("rule")
    table.add_column("bits per byte", justify="right")
    rules = decision["candidates"]
    alone = [one for one in decision["tried"] if one["kind"] is None]
    for one in sorted(alone, key=lambda one: one["bits_per_byte"]):
        table.add_row(plain(rules[one["candidate"]]), f"{one['bits_per_byte']:.3f}")
    table.add_row("by kind of token, as follows", f"{decision['bits_per_byte']:.3f}")
    console.print(table)
    kinds = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    kinds.add_column("kind of token")
    kinds.add_column("new in the text", justify="right")
    kinds.add_column("rule")
    for kind, rule in decision["rules"].items():
        kinds.add_row(*map(plain, [kind or "others", decision["new_tokens"].get(kind, 0), rule]))
    console.print(kinds)
    console.print(f"Chosen on {decision['bytes']:,} bytes of the text; what is measured below are others.")


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)
