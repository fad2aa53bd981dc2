"""A line for each request: tokens read, kept and written."""

from __future__ import annotations

from typing import NamedTuple

from quickmerge.merge.run import RunStats
from quickmerge.multipole import MultipoleStats
from quickmerge.recipe.run import RecipeStats
from quickmerge.speculative.drafter import Stats

__all__ = ["Wrote", "told"]


class Wrote(NamedTuple):
    """One call of ``generate``: its rows, tokens of each that were given and written, and seconds."""

    rows: int
    read: int
    tokens: int
    seconds: float


def told(stats: RecipeStats | None, wrote: Wrote) -> str:
    """What one call read, kept and wrote, as one line; ``stats`` is None where the model answered alone."""
    parts: list[str] = []
    rows = f"{wrote.rows} rows of " if wrote.rows > 1 else ""
    counts = [] if stats is None else list(stats.of.values())
    merged = next((each for each in counts if isinstance(each, RunStats)), None)
    if stats is None:
        parts.append(f"read {rows}{wrote.read} tokens, kept all: keep=1")
    elif merged is None:
        parts.append(f"read {rows}{wrote.read} tokens")
    else:
        parts += _merged(merged, rows)
    for each in counts:
        if isinstance(each, MultipoleStats) and each.decode_steps:
            parts.append(f"a new token read {each.rows_read:.0f} of {each.rows_dense:.0f} keys")
        elif isinstance(each, Stats) and each.row_passes:
            parts.append(f"{each.tokens_per_pass:.2f} tokens per pass")
    return ", ".join([*parts, f"wrote {wrote.tokens} in {wrote.seconds:.2f} s"])


def _merged(stats: RunStats, rows: str) -> list[str]:
    """What was read and kept of a prompt, or why all of it was."""
    read = f"read {rows}{stats.tokens_in:g} tokens"
    held = stats.prompt_cache_bytes / stats.prompt_cache_bytes_full if stats.prompt_cache_bytes_full else 1.0
    fewer = [block for block, tokens in enumerate(stats.tokens_per_layer) if tokens < stats.tokens_in]
    if not fewer and held >= 1:
        return [read, f"passed unreduced{_why(stats)}"]
    kept = []
    if fewer:
        share = 100 * stats.tokens_kept / stats.tokens_in
        kept.append(f"kept {stats.tokens_kept:.0f} ({share:.0f} %) from block {fewer[0]} on")
    return [read, *kept, f"cache {100 * held:.0f} %"]


def _why(stats: RunStats) -> str:
    if stats.rows_short:
        return f": fewer than min_tokens={stats.min_tokens}"
    if stats.rows_protected:
        return ": all of them are protected"
    return ": fewer than min_tokens of the cache" if stats.evicted_none else ""
