"""Documents and prompts as chunks: nothing lost, nothing out of order, pads where they belong."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quickmerge.calm import chunk_document, chunk_prompts, real_chunks
from quickmerge.calm.chunks import chunk_count
from quickmerge.errors import QuickmergeError

EOS, PAD = 1, 9
ROWS = st.lists(st.integers(2, 8), max_size=13)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(1, 5), st.data())
def test_a_document_is_its_tokens_between_pads(ids: list[int], patch: int, data: st.DataObject) -> None:
    phase = data.draw(st.integers(0, patch - 1))
    chunks = chunk_document(ids, patch, EOS, PAD, phase)
    flat = chunks.flatten().tolist()
    assert chunks.shape == (chunk_count(len(ids), patch, phase), patch) and chunks.dtype == torch.long
    behind = len(flat) - phase - len(ids) - 1
    assert flat == [PAD] * phase + ids + [EOS] + [PAD] * behind and 0 <= behind < patch
    assert bool(real_chunks(chunks, PAD).all())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(2, 8), min_size=1, max_size=9), min_size=1, max_size=4), st.integers(1, 5),
       st.booleans())  # fmt: skip
def test_prompts_end_with_their_last_token(rows: list[list[int]], patch: int, left: bool) -> None:
    """Whatever side a tokenizer pads on, and with whatever id, even one that is a token's."""
    wide = max(map(len, rows))
    ids = torch.full((len(rows), wide), 3)
    mask = torch.zeros(len(rows), wide, dtype=torch.long)
    for at, row in enumerate(rows):
        place = slice(wide - len(row), None) if left else slice(0, len(row))
        ids[at, place], mask[at, place] = torch.tensor(row), 1
    made, real = chunk_prompts(ids, patch, PAD, mask)
    assert made.shape[1] == -(-wide // patch) * patch and real.shape == (len(rows), made.shape[1] // patch)
    for row, out, there in zip(rows, made.tolist(), real.tolist(), strict=True):
        assert out == [PAD] * (len(out) - len(row)) + row
        assert there == [i >= len(there) - -(-len(row) // patch) for i in range(len(there))]
    assert torch.equal(real_chunks(made.view(len(rows), -1, patch), PAD), real)


def test_a_prompt_looks_like_the_beginning_of_a_document() -> None:
    """The chunks of a prompt are those of a document that begins with it, in the phase that training may draw."""
    prompt = [2, 3, 4, 5, 6]
    ids, _ = chunk_prompts(torch.tensor([prompt]), 4, PAD)
    document = chunk_document([*prompt, 7, 8], 4, EOS, PAD, phase=3)
    assert torch.equal(ids.view(-1, 4), document[:2])


def test_what_is_no_chunk_is_told() -> None:
    with pytest.raises(ValueError, match="phase must be a whole number from 0 to 3, got 4"):
        chunk_document([2], 4, EOS, PAD, 4)
    with pytest.raises(ValueError, match="patch must be a whole number of at least 1, got 0"):
        chunk_document([2], 0, EOS, PAD)
    with pytest.raises(ValueError, match="ids must be a row of token ids"):
        chunk_document([[2, 3]], 4, EOS, PAD)  # type: ignore[list-item]
    with pytest.raises(QuickmergeError, match="input_ids must be"):
        chunk_prompts(torch.tensor([2, 3]), 4, PAD)
    with pytest.raises(
        QuickmergeError, match=r"attention_mask must have the shape of input_ids, \(1, 2\), got \(1, 3\)"
    ):
        chunk_prompts(torch.tensor([[2, 3]]), 4, PAD, torch.ones(1, 3))
    with pytest.raises(QuickmergeError, match="at least one token"):
        chunk_prompts(torch.tensor([[2, 3], [4, 5]]), 4, PAD, torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(QuickmergeError, match="at least one token"):
        chunk_prompts(torch.empty(1, 0, dtype=torch.long), 4, PAD)
