"""The rows of a batch: which are done, and what ``generate`` would return for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList

from quickmerge.decoding.walk import Row

__all__ = ["Batch"]


class Batch:
    """Rows that are written at different speeds and returned as if they had been written in step.

    ``generate`` gives every row a token in each step until all are done. With an end-of-sequence token rows that are
    done get padding; without one they are simply written on until the last row is done, and so they are here.

    Args:
        rows: all of them.
        config: of ``generate``.
        criteria: what ends a row.
    """

    def __init__(self, rows: Sequence[Row], config: GenerationConfig, criteria: StoppingCriteriaList) -> None:
        self.rows = list(rows)
        self.max_length: int | None = criteria.max_length
        ends = [c.eos_token_id for c in criteria if hasattr(c, "eos_token_id")]
        self.pad: int | None = None
        if ends:
            first = int(torch.as_tensor(ends[0]).flatten()[0])
            self.pad = first if config.pad_token_id is None else int(config.pad_token_id)

    def done(self, row: Row) -> bool:
        """Whether a row needs no more tokens."""
        if self.pad is not None or len(self.rows) == 1:
            return row.stop is not None
        if row.stop is None:
            return False
        if self.max_length is not None and row.length >= self.max_length:
            return True
        stops = [each.stop for each in self.rows]
        return all(stop is not None and row.length >= stop for stop in stops)

    def left(self, row: Row) -> int:
        """How many more tokens a row may get."""
        return 1 << 30 if self.max_length is None else self.max_length - row.length

    def sequences(self) -> Tensor:
        """``(B, L)`` ids once all rows are done: as long as the row that was done last."""
        length = max(row.stop or row.length for row in self.rows)
        out = self.rows[0].text.new_full((len(self.rows), length), 0 if self.pad is None else self.pad)
        for i, row in enumerate(self.rows):
            mine = row.text[: length if self.pad is None else row.stop]
            out[i, : len(mine)] = mine
        return out
