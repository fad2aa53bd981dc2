"""Logits processors, asked about one row of a batch."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from quickmerge.models.compat import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)

__all__ = ["for_row"]

BY_NUMBER = (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
)
"""Processors of transformers that treat rows by their number."""


def for_row(processors: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The processors of a batch, for one row alone: they take ids ``(1, L)`` and scores ``(1, V)``.

    Rows are written at different speeds, so no two of them can be asked about at once. Most processors look at a row
    and nothing else. Those that may know the rows by number, all that are not transformers' own among them, are given
    the row as often as there are rows, and answer for its number.
    """
    if rows == 1:
        return processors
    return LogitsProcessorList([_Numbered(p, row, rows) if _by_number(p) else p for p in processors])


def _by_number(processor: LogitsProcessor) -> bool:
    # A repetition penalty on left-padded prompts has as many lengths of padding as there are rows.
    lengths = isinstance(getattr(processor, "prompt_ignore_length", None), torch.Tensor)
    return isinstance(processor, BY_NUMBER) or lengths or not type(processor).__module__.startswith("transformers.")


class _Numbered(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, processor: LogitsProcessor, row: int, rows: int) -> None:
        self.processor, self.row, self.rows = processor, row, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        found: Tensor = self.processor(input_ids.repeat(self.rows, 1), scores.repeat(self.rows, 1))
        return found[self.row : self.row + 1]
