"""Tables of transplanted vocabularies: each takes the rows of a list in a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from quickmerge.bench.table import Cell, Column, Table, interval, number, text, unless

Row = dict[str, Any]
PLACES = ("prose", "code", "the language")
"""What the texts of every vocabulary are, in their order; some have but the first."""
VOCABULARY = Column("vocabulary", text("vocabulary"))
METHOD = Column("method", lambda r: f"**{r['method']}**" if r["method"] == "auto" else str(r["method"]))
BITS = interval("bits_per_byte", ".3f")


def quality(rows: Sequence[Row]) -> Table:
    """Held-out cosines and bits per byte by method."""
    weights = unless(lambda r: not r["weight_sum_spread"],
                     lambda r: f"{r['weight_sum']:.2f} ± {r['weight_sum_spread']:.2f}")  # fmt: skip
    columns = [
        VOCABULARY, METHOD,
        Column("rule that it took", unless(lambda r: " for " in r["rule"], text("rule"), "by kind of token")),
        Column("centred cosine", number("centred_cosine", ".3f")), Column("cosine", number("cosine", ".3f")),
        Column("sum of weights", weights), *by_place("bits per byte, {} (95 %)", BITS),
    ]  # fmt: skip
    return Table(columns, _by_method(rows))


def apart(rows: Sequence[Row]) -> Table:
    """Bits per token of shared and of new tokens, and how often a new row wins."""
    shared, new = (number(f"bits_per_{kind}_token", ".2f") for kind in ("shared", "new"))

    def bits(r: Row) -> str:
        return f"{r['new_tokens']} of {r['tokens']}" if "counts" in r else f"{shared(r)} / {new(r)}"

    def won(r: Row) -> str:
        if "counts" in r:
            return ""
        return next(f"{100 * one['logits']['share_won']:.0f} %" for one in r["own"] if one["logits"])

    lines = _by_method(rows)
    counts = [{**r, "own": [{**one, "counts": True} for one in r["own"]], "counts": True}
              for r in lines if r["method"] == "auto"]  # fmt: skip
    method = Column("method", unless(lambda r: "counts" in r, METHOD.cell, "*new tokens*"))
    columns = [VOCABULARY, method, *by_place("{}: shared / new", bits), Column("a new row wins at", won)]
    return Table(columns, counts + lines)


def before(rows: Sequence[Row]) -> Table:
    """The model with its own tokenizer, and how finely each cuts."""
    columns = [
        Column("new vocabulary", text("vocabulary")), Column("text", text("kind")),
        Column("bits per byte before (95 %)", BITS), Column("tokens per byte before", number("tokens_per_byte", ".3f")),
        Column("after", number("after_tokens_per_byte", ".3f")),
        Column("change", lambda r: f"{100 * (r['after_tokens_per_byte'] / r['tokens_per_byte'] - 1):+.0f} %"),
    ]  # fmt: skip
    return Table(columns, rows)


def against_auto(rows: Sequence[Row]) -> Table:
    """What auto took beside what turned out best."""

    def is_auto(r: Row) -> bool:
        return bool(r["best"] == "auto")

    columns = [
        VOCABULARY, Column("text", text("kind")), Column("auto, bits per byte", number("auto_bits_per_byte", ".3f")),
        Column("chosen by held-out tokens only",
               lambda r: f"{r['held_out_only_bits_per_byte']:.3f} ({r['held_out_only']})"),
        Column("best method", unless(
            is_auto, lambda r: f"{r['best']} ({r['best_rule']}), {r['best_bits_per_byte']:.3f}", "auto")),
        Column("auto is behind by (paired)",
               unless(lambda r: is_auto(r) or not r["behind"], interval("behind", "+.3f"))),
        Column("best or within noise", lambda r: "yes" if r["within_noise"] else "no"),
    ]  # fmt: skip
    return Table(columns, rows)


def decisions(rows: Sequence[Row]) -> Table:
    """Which rule auto took for which kind of token, and how many new ones were in what it chose on."""
    columns = [VOCABULARY, Column("kind of token", text("kind")), Column("new ones in the text", text("new")),
               Column("rule", text("rule"))]  # fmt: skip
    return Table(columns, [
        {"vocabulary": r["vocabulary"], "kind": kind or "others", "new": r["new_tokens"].get(kind, 0), "rule": rule}
        for r in rows for kind, rule in r["rules"].items()
    ])  # fmt: skip


def hidden(rows: Sequence[Row]) -> Table:
    """Bits per byte while shared tokens are hidden."""
    found = {(r["share"], r["method"]): r for r in rows}
    methods = list(dict.fromkeys(r["method"] for r in rows))
    new = "tokens of the text that are new"

    def at(share: float) -> Column:
        def cell(line: Row) -> str:
            if line["method"] != new:
                return BITS(found[share, line["method"]])
            r = found[share, methods[0]]
            return f"{r['new_tokens'] / r['tokens']:.0%}"

        return Column(f"{share:.0%} hidden", cell)

    columns = [Column("method", text("method")), *map(at, dict.fromkeys(r["share"] for r in rows))]
    return Table(columns, [{"method": method} for method in (*methods, new)])


def speed(rows: Sequence[Row]) -> Table:
    """What matching pursuit costs."""

    def seconds(name: str, way: str) -> Column:
        return Column(name, lambda r: f"{r['seconds'][way]:.1f} s")

    ratio = interval("ratio", ".2f", unit="x", ends=("low", "high"), base="")
    columns = [
        Column("k", text("k")), seconds("straightforward", "straightforward"), seconds("here", "screened"),
        seconds("float32 products alone", "floor"),
        Column("ratio (quartiles)", lambda r: ratio(r["speedup"]["screened"])),
        Column("targets that differ", lambda r: str(r["differences"]["targets"])),
    ]  # fmt: skip
    return Table(columns, rows)


def by_place(name: str, cell: Cell) -> list[Column]:
    """A column for each text of a vocabulary, some of which have but the first."""

    def at(order: int) -> Column:
        there = unless(lambda r: order >= len(r["own"]), lambda r: cell(r["own"][order]))
        return Column(name.format(PLACES[order]), there)

    return [at(order) for order in range(len(PLACES))]


def _by_method(rows: Sequence[Row]) -> list[Row]:
    """A line for each vocabulary and method: the first of its rows, and under ``own`` one for each kind of text."""
    found: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        found.setdefault((r["vocabulary"], r["method"]), []).append(r)
    return [{**own[0], "own": own} for own in found.values()]


TRANSPLANT: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    "transplant": ("transplant", quality, "rows"),
    "transplant_apart": ("transplant", apart, "rows"),
    "transplant_before": ("transplant", before, "before"),
    "transplant_auto": ("transplant", against_auto, "against_auto"),
    "transplant_decisions": ("transplant", decisions, "decisions"),
    "transplant_hidden": ("transplant", hidden, "hidden"),
    "omp_speed": ("omp_speed", speed, "rows"),
}
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
