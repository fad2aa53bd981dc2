"""The serial head's cache against lists of what each row was given."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quickmerge.speculative.gumiho.network import RowCache


@given(
    steps=st.lists(st.lists(st.integers(0, 40), min_size=3, max_size=3).filter(any), min_size=1, max_size=12),
    scratch=st.integers(0, 5),
    drop=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_rows_hold_what_they_were_given(steps: list[list[int]], scratch: int, drop: bool) -> None:
    """Rows of different lengths, drafts behind them, more than one growth, and rows that leave."""
    draws = torch.Generator().manual_seed(0)
    cache, kept = RowCache(3), [torch.empty(2, 0, 4) for _ in range(3)]

    def put(at: Tensor, width: int, first: int | None) -> tuple[Tensor, Tensor, Tensor]:
        cache.aim(at, width, first)
        new = torch.randn(len(kept), 2, at.shape[1], 4, generator=draws)
        return new, *cache.update(new, -new, 0)

    for number, counts in enumerate(steps):
        if drop and number == len(steps) // 2 and number:
            cache.rows(torch.tensor([2, 0]))
            kept = [kept[2], kept[0]]
        counts = counts[: len(kept)]
        wide = max(*counts, 1)
        at = torch.tensor(cache.length)[:, None] + torch.arange(wide)
        even = cache.length[0] if len(set(cache.length)) == 1 else None
        new, keys, values = put(at, max(cache.length) + wide, even)
        kept = [torch.cat([old, row[:, :n]], 1) for old, row, n in zip(kept, new, counts, strict=True)]
        cache.length = [old + n for old, n in zip(cache.length, counts, strict=True)]
        if scratch:
            base = max(cache.length)
            drafted, keys, values = put(torch.arange(base, base + scratch).expand(len(kept), -1), base + scratch, base)
            assert torch.equal(keys[:, :, base:], drafted)
        for row, old in enumerate(kept):
            assert cache.length[row] == old.shape[1]
            assert torch.equal(keys[row, :, : old.shape[1]], old)
            assert torch.equal(values[row, :, : old.shape[1]], -old)
        assert bool(keys.isfinite().all())
