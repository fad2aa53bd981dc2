"""Tables of transplanted vocabularies: each takes the rows of a list in a result file and gives headers and cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
PLACES = ("prose", "code", "the language")
"""What the texts of every vocabulary are, in their order; some have but the first."""


def quality(rows: Sequence[Row]) -> Table:
    """Held-out cosines and bits per byte by method."""
    body = []
    for (vocabulary, _), own in _by_method(rows).items():
        r = own[0]
        weights = "" if not r["weight_sum_spread"] else f"{r['weight_sum']:.2f} ± {r['weight_sum_spread']:.2f}"
        cosines = ["" if r[key] is None else f"{r[key]:.3f}" for key in ("centred_cosine", "cosine")]
        cells = [vocabulary, _name(r), _rule(r["rule"]), *cosines, weights]
        body.append(cells + _wide([_bits(one) for one in own]))
    headers = ["vocabulary", "method", "rule that it took", "centred cosine", "cosine", "sum of weights"]
    return headers + [f"bits per byte, {place} (95 %)" for place in PLACES], body


def apart(rows: Sequence[Row]) -> Table:
    """Bits per token of shared and of new tokens, and how often a new row wins."""
    body = []
    for (vocabulary, _), own in _by_method(rows).items():
        bits = [f"{_cell(r['bits_per_shared_token'])} / {_cell(r['bits_per_new_token'])}" for r in own]
        won = next(f"{100 * r['logits']['share_won']:.0f} %" for r in own if r["logits"])
        body.append([vocabulary, _name(own[0]), *_wide(bits), won])
    best = [[name, "*new tokens*", *_wide([f"{r['new_tokens']} of {r['tokens']}" for r in own]), ""]
            for (name, method), own in _by_method(rows).items() if method == "auto"]  # fmt: skip
    headers = ["vocabulary", "method", *(f"{place}: shared / new" for place in PLACES), "a new row wins at"]
    return headers, best + body


def before(rows: Sequence[Row]) -> Table:
    """The model with its own tokenizer, and how finely each cuts."""
    body = [
        [r["vocabulary"], r["kind"], _bits(r), f"{r['tokens_per_byte']:.3f}", f"{r['after_tokens_per_byte']:.3f}",
         f"{100 * (r['after_tokens_per_byte'] / r['tokens_per_byte'] - 1):+.0f} %"]
        for r in rows
    ]  # fmt: skip
    headers = ["new vocabulary", "text", "bits per byte before (95 %)", "tokens per byte before", "after", "change"]
    return headers, body


def against_auto(rows: Sequence[Row]) -> Table:
    """What auto took beside what turned out best."""
    body = [
        [r["vocabulary"], r["kind"], f"{r['auto_bits_per_byte']:.3f}",
         f"{r['held_out_only_bits_per_byte']:.3f} ({r['held_out_only']})",
         f"{r['best']} ({r['best_rule']}), {r['best_bits_per_byte']:.3f}" if r["best"] != "auto" else "auto",
         "" if r["best"] == "auto" else _gap(r, "behind"), "yes" if r["within_noise"] else "no"]
        for r in rows
    ]  # fmt: skip
    headers = ["vocabulary", "text", "auto, bits per byte", "chosen by held-out tokens only", "best method",
               "auto is behind by (paired)", "best or within noise"]  # fmt: skip
    return headers, body


def decisions(rows: Sequence[Row]) -> Table:
    """Which rule auto took for which kind of token, and how many new ones were in what it chose on."""
    body = [
        [r["vocabulary"], kind or "others", f"{r['new_tokens'].get(kind, 0)}", rule]
        for r in rows for kind, rule in r["rules"].items()
    ]  # fmt: skip
    return ["vocabulary", "kind of token", "new ones in the text", "rule"], body


def hidden(rows: Sequence[Row]) -> Table:
    """Bits per byte while shared tokens are hidden."""
    found = {(r["share"], r["method"]): r for r in rows}
    shares = list(dict.fromkeys(r["share"] for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    body = [[method, *(_bits(found[share, method]) for share in shares)] for method in methods]
    body.append(["tokens of the text that are new", *(
        f"{found[s, methods[0]]['new_tokens'] / found[s, methods[0]]['tokens']:.0%}" for s in shares
    )])  # fmt: skip
    return ["method", *(f"{share:.0%} hidden" for share in shares)], body


def speed(rows: Sequence[Row]) -> Table:
    """What matching pursuit costs."""
    body = []
    for r in rows:
        ratio = r["speedup"]["screened"]
        seconds = [f"{r['seconds'][way]:.1f} s" for way in ("straightforward", "screened", "floor")]
        body.append([f"{r['k']}", *seconds, f"{ratio['ratio']:.2f}x ({ratio['low']:.2f} to {ratio['high']:.2f})",
                     f"{r['differences']['targets']}"])  # fmt: skip
    headers = ["k", "straightforward", "here", "float32 products alone", "ratio (quartiles)", "targets that differ"]
    return headers, body


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


def _by_method(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    """Vocabulary and method: a row for each kind of text."""
    found: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        found.setdefault((r["vocabulary"], r["method"]), []).append(r)
    return found


def _wide(cells: list[str]) -> list[str]:
    return cells + [""] * (len(PLACES) - len(cells))


def _rule(rule: str) -> str:
    return "by kind of token" if " for " in rule else rule


def _name(r: Row) -> str:
    return f"**{r['method']}**" if r["method"] == "auto" else str(r["method"])


def _bits(r: Row) -> str:
    return f"{r['bits_per_byte']:.3f} ({r['bits_per_byte_low']:.3f} to {r['bits_per_byte_high']:.3f})"


def _gap(r: Row, key: str) -> str:
    if not r[key]:
        return ""
    return f"{r[key]:+.3f} ({r[f'{key}_low']:+.3f} to {r[f'{key}_high']:+.3f})"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
