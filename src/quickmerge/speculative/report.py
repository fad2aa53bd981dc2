"""The benchmark of drafters in a terminal and on a page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from quickmerge.bench.report import Report, Section
from quickmerge.bench.table import Column, Table, half_width, interval, number, text, unless

Rows = Sequence[Mapping[str, Any]]


def is_plain(row: Mapping[str, Any]) -> bool:
    """Whether a row is the model alone."""
    return bool(row["method"] == "plain")


TEMPERATURE = Column("temperature", number("temperature"))
METHOD = Column("method", text("method"), "l")
PER_SECOND = Column("tokens/s", number("tokens_per_second", ".1f"))
NODES = Column("nodes", number("nodes", ".1f"), spare=True)
DRAFTING = Column("drafting", number("draft_share", ".0f", scale=100, unit=" %"), spare=True)
SAME = Column(
    "same text", unless(lambda r: r["same"] is None or is_plain(r), lambda r: f"{r['same']} of {r['prompts']}")
)
_SPEED = number("speedup", ".2f", unit="x")
COLUMNS = (
    METHOD,
    Column(
        "tokens per forward pass",
        lambda r: (number("tokens_per_pass", ".2f") if is_plain(r) else half_width("tokens_per_pass", ".2f"))(r),
    ),
    Column("speed", lambda r: (_SPEED if is_plain(r) else interval("speedup", ".2f", unit="x"))(r), short=_SPEED),
    PER_SECOND,
    NODES,
    DRAFTING,
    SAME,
)
_METHOD = (
    "Tokens per forward pass are new tokens over passes of the model. The prompt's pass and the token that it gives "
    "are left out on both sides; the token that the model adds to the accepted ones is counted. So plain decoding has "
    "exactly 1. ± is half of the 95 % interval over prompts drawn with replacement.",
    "Speed is the time of plain decoding for each token over the method's, whole calls with everything inside: the "
    "median over prompts, and quartiles. Methods took turns, in another order for each prompt. Nodes are what a pass "
    "reads on average, and drafting is the share of the time that the drafter takes.",
    "Same text counts the prompts whose greedy text is that of plain decoding, token for token.",
)


def drafters_report(rows: Rows, meta: Mapping[str, Any]) -> Report:
    """The report of these rows and of what was measured."""
    body = ordered(rows)
    drafted = [row for row in body if "reached" in row]
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["kinds"]))
    depths = range(max((len(row["reached"]) for row in drafted), default=0))

    def by_temperature(columns: Iterable[Column], rows: Rows) -> Table:
        several = replace(TEMPERATURE, align="r", when=lambda rows: len({row["temperature"] for row in rows}) > 1)
        return Table([several, *columns], rows, group=lambda row: row["temperature"])

    sections = [
        Section("Tokens per forward pass, and speed", by_temperature(COLUMNS, body)),
        Section(
            "Passes that accepted so many drafted tokens or more",
            by_temperature([METHOD, *map(_reached, depths)], drafted), printed=False,
        ),
        Section("Tokens per forward pass, by kind of prompt", by_temperature([METHOD, *map(_per_pass, kinds)], body),
                printed=False),
    ]  # fmt: skip
    title = f"{meta['model']}: several tokens a step on {meta['prompts']} prompts"
    return Report(title, sections, _METHOD, meta, legend=_LEGEND)


def ordered(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """By temperature, plain decoding first, then the slowest to the fastest."""
    return sorted(rows, key=lambda row: (row["temperature"], not is_plain(row), row["speedup"]))


_LEGEND = (
    "tokens per forward pass: the model's own token counted, ± half of the 95 % interval over prompts; speed: median"
)


def _reached(depth: int) -> Column:
    there = unless(lambda r: depth >= len(r["reached"]), lambda r: f"{100 * r['reached'][depth]:.0f} %")
    return Column(f"{depth + 1}", there)


def _per_pass(kind: str) -> Column:
    return Column(kind, lambda r: f"{r['kinds'][kind]['tokens_per_pass']:.2f}")
