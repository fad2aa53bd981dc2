"""The rows of a benchmark: which of them belong together, and in what order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from quickmerge.bench.literals import LITERALS
from quickmerge.bench.table import Cell, Column, Row, Table
from quickmerge.errors import QuickmergeError
from quickmerge.viz.format import NONE, clean, count, loss, number, one_line, percent, seconds, share, size, times

_FULL = ("full", "none", "identity")
_NOT_AVERAGED = ("recovery_low", "recovery_high")


def name_of(row: Row) -> str:
    """Return the reducer of ``row``."""
    if row.get("reducer") is None:
        raise QuickmergeError("Every benchmark row needs the name of its reducer under 'reducer'.")
    return clean(row["reducer"])


def is_ours(name: str) -> bool:
    """Return whether ``name`` is quickmerge or one of its variants."""
    return name.lower().startswith("quickmerge")


def is_full(row: Row) -> bool:
    """Return whether ``row`` is the unreduced run."""
    return name_of(row).lower() in _FULL


def has_kind(row: Row) -> bool:
    """Return whether ``row`` is about one kind of document only."""
    return row.get("kind") is not None


def overall(rows: Sequence[Row]) -> list[Row]:
    """Return the rows over all documents.

    Where there are only rows by kind, they are averaged for each reducer and keep value; their intervals cannot
    be averaged and are left out.
    """
    whole = [row for row in rows if not has_kind(row)]
    if whole:
        return whole
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((name_of(row), number(row, "keep")), []).append(row)
    return [_mean(group) for group in groups.values()]


def by_reducer(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows of each reducer from its smallest keep value up, ours last (drawn on top)."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not is_full(row):
            groups.setdefault(name_of(row), []).append(row)
    ordered = sorted(groups, key=lambda name: (is_ours(name), name))
    return {name: sorted(groups[name], key=lambda row: number(row, "keep") or 0.0) for name in ordered}


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Return rows as a reader compares them: the unreduced run, then by keep value, best recovery first."""

    def key(row: Row) -> tuple[bool, float, bool, float, str]:
        recovery = number(row, "recovery")
        keep = number(row, "keep")
        return (not is_full(row), -(keep or 0.0), recovery is None, -(recovery or 0.0), name_of(row))

    return sorted(rows, key=key)


def _mean(group: Sequence[Row]) -> Row:
    result: dict[str, object] = {"reducer": group[0]["reducer"]}
    for name in group[0]:
        if name not in ("reducer", "kind", *_NOT_AVERAGED):
            values = [value for row in group if (value := number(row, name)) is not None]
            result[name] = sum(values) / len(values) if values else None
    return result


# The rows of a benchmark written out as cells of a table.


def _in(write: Callable[[float | None], str], key: str) -> Cell:
    return lambda row: write(number(row, key))


def _interval(row: Row) -> str:
    low, high = number(row, "recovery_low"), number(row, "recovery_high")
    return NONE if low is None or high is None else f"{percent(low)} to {percent(high)}"


def _cache(row: Row) -> str:
    ratio = number(row, "cache_ratio")
    return size(number(row, "cache_bytes")) if ratio is None else percent(ratio)


REDUCER = Column("reducer", name_of)
KEEP = Column("keep", _in(share, "keep"))
COLUMNS = (
    REDUCER,
    KEEP,
    Column("tokens", _in(count, "tokens_kept"), spare=True),
    Column("recovery", _in(percent, "recovery")),
    Column("interval", _interval, spare=True),
    Column("NLL", _in(loss, "nll"), spare=True),
    Column("prefill", _in(seconds, "prefill_seconds")),
    Column("speed-up", _in(times, "prefill_speedup")),
    Column("reducer time", _in(seconds, "reducer_seconds"), spare=True),
    Column("FLOPs", _in(percent, "flops_ratio")),
    Column("cache", _cache),
    *LITERALS,
)


def by_kind(rows: Sequence[Row]) -> Table | None:
    """The recovery by kind of document, a row for each reducer and keep; None where no row has a kind."""
    some = ranked([row for row in rows if has_kind(row) and not is_full(row)])
    groups: dict[tuple[str, float | None], list[Row]] = {}
    for row in some:
        groups.setdefault((name_of(row), number(row, "keep")), []).append(row)

    def key(group: list[Row]) -> tuple[float, float]:
        values = [value for row in group if (value := number(row, "recovery")) is not None]
        return -(number(group[0], "keep") or 0.0), -sum(values) / max(1, len(values))

    def of(kind: str) -> Column:
        found = {(name_of(row), number(row, "keep")): row for row in some if clean(row["kind"]) == kind}
        return Column(kind, lambda row: percent(number(
            found.get((name_of(row), number(row, "keep")), {}), "recovery")))  # fmt: skip

    kinds = sorted({clean(row["kind"]) for row in some})
    if not kinds:
        return None
    return grouped([REDUCER, KEEP, *map(of, kinds)], [group[0] for group in sorted(groups.values(), key=key)])


def grouped(columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table in which rows of one keep value stand together, ours set off."""
    return Table(columns, rows, strong=lambda row: is_ours(name_of(row)), group=lambda row: number(row, "keep"))


# Say in one sentence what the numbers say, and never more.


_NOTICEABLE = 1.02  # a smaller change than this is told as none


def demo_verdict(
    *,
    model: str,
    document: str,
    tokens_in: float,
    tokens_kept: float,
    full_seconds: float | None,
    reduced_seconds: float | None,
    recovery: float | None,
) -> str:
    """Return one sentence on a run: how much was read, how long it took, what survived."""
    start = f"With {count(tokens_kept)} of {count(tokens_in)} tokens kept, {one_line(model, 60)}"
    clauses = [f"{start} {_pace(one_line(document, 60), full_seconds, reduced_seconds)}"]
    if recovery is not None:
        clauses.append(_survival(recovery))
    return ", ".join(clauses) + "."


def pace(full: float, reduced: float) -> str:
    """Return how ``reduced`` seconds compare with ``full`` seconds, in a few words."""
    ratio = full / reduced
    if 1 / _NOTICEABLE < ratio < _NOTICEABLE:
        return "as fast"
    factor = max(ratio, 1 / ratio)
    amount = f"{100 * (factor - 1):.0f}%" if factor < 1.2 else times(factor)
    return f"{amount} {'faster' if ratio > 1 else 'slower'}"


def _pace(document: str, full: float | None, reduced: float | None) -> str:
    if full is None or reduced is None or full <= 0 or reduced <= 0:
        return f"read {document}"
    words = pace(full, reduced)
    took = f"{seconds(reduced)} instead of {seconds(full)}"
    if words == "as fast":
        return f"read {document} in about the same time ({took})"
    return f"read {document} {words} ({took})"


def _survival(recovery: float) -> str:
    if recovery >= 1:
        return "and what follows the document was predicted as well as after reading all of it"
    if recovery <= 0:
        return "but what follows the document was predicted no better than without reading it"
    word = "and" if recovery >= 0.5 else "but only"
    return f"{word} {percent(recovery)} of the benefit of reading the document survived"


def bench_verdict(rows: Sequence[Row]) -> str:
    """Return one sentence on a benchmark: our best reducer against the best other one near a quarter of the tokens."""
    scored = [row for row in rows if number(row, "recovery") is not None and not is_full(row)]
    ours = [row for row in scored if is_ours(name_of(row))]
    keeps = {keep for row in ours or scored if (keep := number(row, "keep")) is not None}
    if not keeps:
        return "No row of this benchmark has both a keep value and a recovery, so there is nothing to compare."
    keep = min(keeps, key=lambda value: (abs(value - 0.25), value))
    level = sorted((row for row in scored if number(row, "keep") == keep), key=_recovery, reverse=True)
    first = next((row for row in level if is_ours(name_of(row))), level[0])
    rival = next((row for row in level if is_ours(name_of(row)) != is_ours(name_of(first))), None)
    if rival is None and not ours and len(level) > 1:
        rival = level[1]
    start = f"With {share(keep)} of the tokens kept, {_result(first)}"
    if rival is None:
        return f"{start}."
    gap = _recovery(first) - _recovery(rival)
    words = "more" if gap < 0 else "less" if gap > 0 else "as much"
    unsure = " (the intervals overlap)" if _overlap(first, rival) else ""
    return (
        f"{start}; the best other reducer, {one_line(name_of(rival), 40)}, recovers {words}: {_numbers(rival)}{unsure}."
    )


def _result(row: Row) -> str:
    return f"{one_line(name_of(row), 40)} recovers {_numbers(row, of=' of the benefit of reading the full documents')}"


def _numbers(row: Row, of: str = "") -> str:
    compute = number(row, "flops_ratio")
    cost = "" if compute is None else f" for {percent(compute)} of the FLOPs"
    return f"{percent(_recovery(row))}{of}{cost}"


def _recovery(row: Row) -> float:
    return number(row, "recovery") or 0.0


def _overlap(one: Row, other: Row) -> bool:
    ends = [number(row, key) for row in (one, other) for key in ("recovery_low", "recovery_high")]
    low, high, other_low, other_high = ends
    if low is None or high is None or other_low is None or other_high is None:
        return False
    return low <= other_high and other_low <= high
