"""Say in one sentence what the numbers say, and never more."""

from __future__ import annotations

from collections.abc import Sequence

from quickmerge.report.numbers import count, number, percent, seconds, share, times
from quickmerge.report.rows import Row, is_full, is_ours, name_of
from quickmerge.report.text import one_line

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
    cost = "" if compute is None else f" for {percent(compute)} of the compute"
    return f"{percent(_recovery(row))}{of}{cost}"


def _recovery(row: Row) -> float:
    return number(row, "recovery") or 0.0


def _overlap(one: Row, other: Row) -> bool:
    ends = [number(row, key) for row in (one, other) for key in ("recovery_low", "recovery_high")]
    low, high, other_low, other_high = ends
    if low is None or high is None or other_low is None or other_high is None:
        return False
    return low <= other_high and other_low <= high
