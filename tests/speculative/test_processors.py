"""Processors of a batch, asked about one row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from quickmerge.speculative.walk import for_row


class ByNumber(LogitsProcessor):  # type: ignore[misc]
    """Adds a row's number, and counts."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls += 1
        return scores.add_(torch.arange(len(scores))[:, None])


def test_one_row_is_asked_about_as_it_is() -> None:
    processors = LogitsProcessorList([ByNumber()])
    assert for_row(processors, 0, 1) is processors


@pytest.mark.parametrize("row", range(3))
def test_a_row_gets_the_answer_for_its_number(row: int) -> None:
    mine, warm = ByNumber(), TemperatureLogitsWarper(2.0)
    try:
        padding = RepetitionPenaltyLogitsProcessor(2.0, prompt_ignore_length=torch.tensor([0, 1, 2]))
    except ValueError as error:
        # Before one length a row was known there was nothing that could be asked about the wrong row.
        pytest.skip(f"the installed transformers takes one length for all rows: {error}")
    made = for_row(LogitsProcessorList([mine, warm, padding]), row, 3)
    assert made[1] is warm
    ids, scores = torch.tensor([[1, 2, 3]]), torch.ones(1, 5)
    found = made(ids, scores)
    wanted = torch.ones(5) + row
    wanted = wanted / 2
    for place, token in enumerate([1, 2, 3]):
        if place >= row:
            wanted[token] /= 2
    assert torch.equal(found, wanted[None])
    assert mine.calls == 1
    assert torch.equal(scores, torch.ones(1, 5))
