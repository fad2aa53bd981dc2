"""Tables of recipes: what works together, why the rest does not, and what each combination took of a real model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

from quickmerge.bench.table import Column, Table, number, text

Row = dict[str, Any]
MATRIX = Path(__file__).parents[1] / "tests" / "recipe" / "matrix.json"
KINDS = {"language": "recipes_language", "vision-language": "recipes_vision"}


@cache
def cells() -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """What a test found: by kind of model, combination, way to generate, and family."""
    found: dict[str, dict[str, dict[str, dict[str, str]]]] = {}
    for name, told in json.loads(MATRIX.read_text(encoding="utf-8")).items():
        kind, combination, way = name.split(" / ")
        found.setdefault(kind, {}).setdefault(combination, {})[way] = told
    return found


def _reason(told: str) -> str:
    """Why something is refused, without what was given in the one case."""
    why = told.removeprefix("refused: ")
    why = re.sub(r", got .*?(?=: |$)", "", why)
    why = re.sub(r" from \[.*?\](?=;)", "", why)
    return re.sub(r"whose (Gumiho|PromptLookup) drafts", "whose drafter drafts", why)


@cache
def reasons() -> dict[str, str]:
    """A letter for each reason of a refusal, in the order in which the tables come to them."""
    every = (
        _reason(told)
        for kind in KINDS for _, ways in _sorted(kind) for way in _ways(kind) for told in ways.get(way, {}).values()
        if told != "works"
    )  # fmt: skip
    return dict(zip(dict.fromkeys(every), ascii_lowercase, strict=False))


def _sorted(kind: str) -> list[tuple[str, dict[str, dict[str, str]]]]:
    return sorted(cells()[kind].items(), key=lambda item: (item[0].count(" + "), item[0]))


def _ways(kind: str) -> list[str]:
    first = ("greedy", "batch", "sampling", "num_return_sequences", "beams", "streamer", "second turn")
    every = dict.fromkeys(way for ways in cells()[kind].values() for way in ways)
    return [*(way for way in first if way in every), *(way for way in every if way not in first)]


def together(rows: Sequence[Row], kind: str) -> Table:
    """Which ingredients work together on a kind of model, and the letter of the reason where they don't."""

    def cell(way: str) -> Callable[[Row], str]:
        def shown(row: Row) -> str:
            told: dict[str, str] = row.get(way, {})
            by: dict[str, list[str]] = {}
            for family, found in told.items():
                by.setdefault("yes" if found == "works" else f"no ({reasons()[_reason(found)]})", []).append(family)
            if len(by) <= 1:
                return next(iter(by), "")
            return "; ".join(f"{said}: {', '.join(families)}" for said, families in sorted(by.items(), reverse=True))

        return shown

    # Written as links in code, so that long names of arguments don't widen the table.
    columns = [Column("ingredients", text("combination")), *(Column(f"`{way}`" if "_" in way else way, cell(way))
               for way in _ways(kind))]  # fmt: skip
    return Table(columns, [{"combination": name, **ways} for name, ways in _sorted(kind)])


def refusals(rows: Sequence[Row]) -> Table:
    """What each letter stands for: the sentence that a user gets."""
    return Table(
        [Column("", text("letter")), Column("what is said", text("why"))],
        [{"letter": letter, "why": why} for why, letter in reasons().items()],
    )


# What they took ------------------------------------------------------------------------------------------------------


def _range(key: str, form: str = ".2f") -> Callable[[Row], str]:
    def cell(r: Row) -> str:
        low, middle, high = r[f"{key}_low"], r[key], r[f"{key}_high"]
        return f"{middle:{form}}" + ("" if r["documents"] == 1 else f" ({low:{form}} to {high:{form}})")

    return cell


def taken(rows: Sequence[Row], dtype: str, threads: int) -> Table:
    """Seconds, cache and what was lost, by length of the prompt."""
    columns = [
        Column("prompt", number("tokens", ",")), Column("recipe", text("arm")),
        Column("to first token", number("first_seconds", ".2f", unit=" s")),
        Column("tokens/s", number("tokens_per_second", ".1f")), Column("in all", number("seconds", ".1f", unit=" s")),
        Column("speedup in all", _range("speedup")), Column("decoding", _range("decode_speedup")),
        Column("tokens per forward pass", number("tokens_per_pass", ".2f")),
        Column("cache", number("cache_ratio", ".2f")),
        Column("right", lambda r: f"{r['exact']} of {r['documents']}"),
        Column("same as plain", lambda r: f"{r['same_as_plain']} of {r['documents']}"),
    ]  # fmt: skip
    return Table(columns, [row for row in rows if row["dtype"] == dtype and row["threads"] == threads])


RECIPES: dict[str, tuple[str, Callable[[Sequence[Row]], Table], str]] = {
    **{name: ("recipes", partial(together, kind=kind), "rows") for kind, name in KINDS.items()},
    "recipes_refused": ("recipes", refusals, "rows"),
    **{
        f"recipes_{dtype}_{threads}": ("recipes", partial(taken, dtype=dtype, threads=threads), "rows")
        for dtype in ("float32", "bfloat16") for threads in (2, 1)
    },
}  # fmt: skip
"""By the name in the docs: the result file, what makes the table of it, and the list that it is made of."""
