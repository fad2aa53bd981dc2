"""The rows of a benchmark written out as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence

from quickmerge.report.numbers import NONE, count, loss, number, percent, seconds, share, size, times
from quickmerge.report.rows import Row, has_kind, is_full, name_of, ranked
from quickmerge.report.text import clean

HEADERS = (
    "reducer",
    "keep",
    "tokens",
    "recovery",
    "interval",
    "NLL",
    "prefill",
    "speed-up",
    "reducer time",
    "compute",
    "cache",
)
# What a narrow terminal leaves out.
SPARE = ("tokens", "interval", "NLL", "reducer time")


def cells(row: Row) -> tuple[str, ...]:
    """Return ``row`` as the cells under :data:`HEADERS`."""
    low, high = number(row, "recovery_low"), number(row, "recovery_high")
    ratio = number(row, "cache_ratio")
    return (
        name_of(row),
        share(number(row, "keep")),
        count(number(row, "tokens_kept")),
        percent(number(row, "recovery")),
        NONE if low is None or high is None else f"{percent(low)} to {percent(high)}",
        loss(number(row, "nll")),
        seconds(number(row, "prefill_seconds")),
        times(number(row, "prefill_speedup")),
        seconds(number(row, "reducer_seconds")),
        percent(number(row, "flops_ratio")),
        size(number(row, "cache_bytes")) if ratio is None else percent(ratio),
    )


def by_kind(rows: Sequence[Row]) -> tuple[list[str], list[list[str]], list[Row]]:
    """Return the recovery by kind of document: the kinds, one line of cells for each reducer and keep, their rows."""
    some = [row for row in rows if has_kind(row) and not is_full(row)]
    kinds = sorted({clean(row["kind"]) for row in some})
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in ranked(some):
        groups.setdefault((name_of(row), number(row, "keep")), []).append(row)

    def key(item: tuple[tuple[str, float | None], list[Row]]) -> tuple[float, float]:
        values = [value for row in item[1] if (value := number(row, "recovery")) is not None]
        return -(item[0][1] or 0.0), -sum(values) / max(1, len(values))

    lines, firsts = [], []
    for (name, keep), group in sorted(groups.items(), key=key):
        found = {clean(row["kind"]): percent(number(row, "recovery")) for row in group}
        lines.append([name, share(keep), *(found.get(kind, NONE) for kind in kinds)])
        firsts.append(group[0])
    return kinds, lines, firsts
