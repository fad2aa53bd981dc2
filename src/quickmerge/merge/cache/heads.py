"""What is known of a cache layer in which every key head holds entries of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quickmerge.models.columns import slide_table, take_tail_of_table


@dataclass(frozen=True)
class HeadTables:
    """Of the ``n`` entries that each of G key heads holds, those of the prompt first.

    A table is None where it would say the same of all entries; its second axis is 1 where heads don't differ. Tables
    are never changed: what comes after makes new ones. Positions are kept where a sliding window asks for them,
    in 32 bits: they are memory that an entry takes beside its key and its value.

    Args:
        count: n.
        valid: ``(B, G, n)`` bool, False where a head holds nothing; None: everywhere True.
        position: ``(B, G, n)`` int32, the place in the given text; None in a layer without a window.
        votes: ``(B, G, n)``, as how many tokens each entry counts in attention, which adds its log; None for one each.
        window: the layer's sliding window in positions, or None.
        lows: ``(n,)``, on the host, the first place of any head in each column; None where it isn't known.
        high: where ``lows`` are known, the last place of all.
    """

    count: int
    valid: Tensor | None = None
    position: Tensor | None = None
    votes: Tensor | None = None
    window: int | None = None
    lows: Any = None
    high: int = 0

    @classmethod
    def picked(
        cls, order: Tensor, there: Tensor, position: Tensor, votes: Tensor | None, window: int | None,
        everywhere: bool | None = None,
    ) -> HeadTables:  # fmt: skip
        """The tables of the entries ``order (B, G, n)``, of which some are ``there (B, G, n)``.

        Args:
            order: which entry of the layer stands where now.
            there: bool, False where a head has fewer.
            position: ``(B, N)`` of the entries before.
            votes: ``(B, N)``, or None.
            window: see the class.
            everywhere: whether all of ``there`` is True; None has it looked up.
        """

        def each(table: Tensor) -> Tensor:
            return table[:, None].expand(-1, order.shape[1], -1).gather(2, order)

        return cls(
            order.shape[2],
            None if (bool(there.all()) if everywhere is None else everywhere) else there,
            None if window is None else each(position).to(torch.int32),
            None if votes is None else each(votes),
            window,
        )

    @property
    def rows(self) -> int | None:
        """How many rows there are, where a table tells."""
        return next((len(table) for table in self._tables.values()), None)

    @property
    def bytes(self) -> int:
        """Memory of the tables."""
        return sum(table.numel() * table.element_size() for table in self._tables.values())

    @property
    def _tables(self) -> dict[str, Tensor]:
        named = {"valid": self.valid, "position": self.position, "votes": self.votes}
        return {name: table for name, table in named.items() if table is not None}

    def _each(self, change: Callable[[str, Tensor], Tensor], count: int | None = None) -> HeadTables:
        changed = {name: change(name, table) for name, table in self._tables.items()}
        return replace(self, count=self.count if count is None else count, **changed)  # type: ignore[arg-type]

    def _told(self, rows: int, device: torch.device | None) -> HeadTables:
        """These with a table of what is valid, also where everything is."""
        if self.valid is not None:
            return self
        return replace(self, valid=torch.ones(rows, 1, self.count, dtype=torch.bool, device=device))

    # What is done to the cache ------------------------------------------------------------------------------------

    def each_row(self, change: Callable[[Tensor], Tensor]) -> HeadTables:
        """Rows of the cache were picked, moved or repeated by ``change``."""
        return self._each(lambda _, table: change(table))

    def last(self, held: int) -> HeadTables:
        """Those of the last ``held`` entries: a sliding window has lost the first."""
        lows = None if self.lows is None else self.lows[-held:]
        cut = replace(self, lows=lows)
        return self if held >= self.count else cut._each(lambda _, table: table[..., self.count - held :], held)

    def first(self, held: int) -> HeadTables:
        """Those of the first ``held`` entries: the cache was cropped."""
        lows = None if self.lows is None else self.lows[:held]
        cut = replace(self, lows=lows)
        return self if held >= self.count else cut._each(lambda _, table: table[..., :held], held)

    def extended(
        self, position: Tensor, valid: Tensor, whole: bool | None = None, high: int | None = None
    ) -> HeadTables:
        """With t new tokens ``(B, t)`` behind them, the same for all heads.

        ``whole`` says whether all are valid, None has it looked up; ``high`` is where the last of any row stands, None
        for behind those that are there.
        """
        t = position.shape[1]
        everywhere = self.valid is None and (bool(valid.all()) if whole is None else whole)
        grown = self if everywhere else self._told(len(valid), valid.device)
        new = {"valid": valid, "position": position, "votes": torch.ones_like(position)}

        def longer(name: str, table: Tensor) -> Tensor:
            return torch.cat([table, new[name][:, None].expand(-1, table.shape[1], -1).to(table.dtype)], -1)

        if self.lows is not None:
            last = self.high + t if high is None else high
            # In every row the new tokens stand behind the last one, and so behind the first of these.
            behind = self.lows[-1] + 1 + np.arange(t)
            grown = replace(grown, lows=np.concatenate([self.lows, behind]), high=max(self.high, last))
        return grown._each(longer, self.count + t)

    def take_tail(self, tail: int, index: Tensor, there: Tensor | None) -> HeadTables:
        """See `quickmerge.models.columns.take_tail`."""
        grown = self if there is None else self._told(len(index), index.device)

        def moved(name: str, table: Tensor) -> Tensor:
            each = table.flatten(0, 1)
            picked = take_tail_of_table(each, tail, index.repeat_interleave(table.shape[1], 0))
            picked = picked.view(*table.shape[:2], -1)
            if name == "valid" and there is not None:
                picked = picked.clone()
                picked[..., picked.shape[-1] - index.shape[1] :] &= there[:, None]
            return picked

        return replace(grown, lows=None)._each(moved, self.count - tail + index.shape[1])

    def slide(self, by: Sequence[int]) -> HeadTables:
        """See `quickmerge.models.columns.slide`."""
        some = next(iter(self._tables.values()), None)
        grown = self._told(len(by), None if some is None else some.device)
        fill = {"valid": False, "position": 0, "votes": 1}

        def moved(name: str, table: Tensor) -> Tensor:
            steps = [step for step in by for _ in range(table.shape[1])]
            return slide_table(table.flatten(0, 1), steps, fill[name]).view(table.shape)

        return replace(grown, lows=None)._each(moved)

    # What attention is told ---------------------------------------------------------------------------------------

    def mask(
        self, queries: int, heads: int, *, additive: bool, dtype: torch.dtype, device: torch.device,
        see: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """The attention mask of the newest ``queries`` tokens over all entries: themselves and those before them.

        Args:
            queries: q; they are among the entries, at the end.
            heads: H, query heads of the model.
            additive: whether 0 and the least number are wanted, and not True and False.
            dtype: of the scores.
            device: where the mask is wanted.
            see: ``(B or 1, 1, q, q)``, what they see of one another, bool or what is added; None: causal order.

        Returns:
            ``(B or 1, H or 1, q, n)``, or None where a query sees everything.
        """
        if queries == 1 and see is None and self.valid is None and self._narrow():
            return None
        n = self.count
        there = torch.ones(queries, n, dtype=torch.bool, device=device).tril(n - queries)[None, None]
        if self.valid is not None:
            there = there & self.valid[:, :, None].to(device)
        if self.window is not None and self.position is not None:
            place = self.position.to(device)
            there = there & (place[:, :, n - queries :, None] - place[:, :, None] < self.window)
        front, own = there[..., : n - queries], there[..., n - queries :]
        # What is padding sees itself, or its attention would be over nothing.
        own = own | torch.eye(queries, dtype=torch.bool, device=device) if see is None else see
        if additive or own.dtype != torch.bool:
            front, own = _added(front, dtype), _added(own, dtype)
        rows, groups = (max(a, b) for a, b in zip(front.shape[:2], own.shape[:2], strict=True))
        mask = torch.cat([front.expand(rows, groups, -1, -1), own.expand(rows, groups, -1, -1)], -1)
        return mask if groups == 1 else mask.repeat_interleave(heads // groups, 1)

    def _narrow(self) -> bool:
        """Whether no entry lies outside of the window."""
        if self.window is None or self.position is None:
            return True
        if self.lows is not None:
            return bool(self.high - self.lows.min() < self.window)
        return int(self.position[..., -1].max()) - int(self.position.min()) < self.window


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros((), dtype=dtype, device=mask.device).where(mask, torch.finfo(dtype).min)
