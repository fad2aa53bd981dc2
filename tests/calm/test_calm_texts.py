"""Windows of chunks: every token in some window, phases drawn anew, held-out passages refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quickmerge.calm import chunk_document
from quickmerge.calm.texts import CalmTexts, document_chunks
from quickmerge.errors import QuickmergeError

EOS, PAD = 1, 64


def words(end: str | None = "</s>") -> PreTrainedTokenizerFast:
    vocabulary = {"</s>": EOS, **{f"w{i}": i for i in range(64) if i != EOS}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w0", eos_token=end)


def text(length: int, first: int = 2) -> str:
    return " ".join(f"w{2 + (first + i) % 60}" for i in range(length))


def ids(length: int, first: int = 2) -> list[int]:
    return [2 + (first + i) % 60 for i in range(length)]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 6), st.data())
def test_windows_are_pieces_of_the_chunked_document(length: int, patch: int, chunks: int, data: st.DataObject) -> None:
    """Each is a stretch of it, the first at its start and the last at its end; with a fixed phase all is covered."""
    phase = data.draw(st.integers(0, patch - 1))
    texts = CalmTexts(words(), [text(length)], patch, chunks, phase=phase)
    whole = chunk_document(ids(length), patch, EOS, PAD, phase)
    covered = set()
    for index in range(len(texts)):
        window = texts[index].view(-1, patch)
        assert window.shape == (chunks, patch) and window.dtype == torch.long
        first = max(0, len(whole) - chunks) if index == len(texts) - 1 else index * chunks
        piece = whole[first : first + chunks]
        assert torch.equal(window[: len(piece)], piece) and bool((window[len(piece) :] == PAD).all())
        covered |= set(range(first, first + len(piece)))
    assert covered == set(range(len(whole)))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(2, 4), st.integers(2, 5), st.integers(0, 999))
def test_random_phases_give_windows_of_some_phase(length: int, patch: int, chunks: int, seed: int) -> None:
    texts = CalmTexts(words(), [text(length)], patch, chunks)
    torch.manual_seed(seed)
    windows = [texts[index] for index in range(len(texts))]
    torch.manual_seed(seed)
    assert all(torch.equal(texts[index], window) for index, window in enumerate(windows))
    possible = [chunk_document(ids(length), patch, EOS, PAD, phase) for phase in range(patch)]
    for index, window in enumerate(windows):
        real = window.view(chunks, patch)
        real = real[(real != PAD).any(1)]
        found = [
            whole
            for whole in possible
            for first in range(len(whole) - len(real) + 1)
            if torch.equal(whole[first : first + len(real)], real)
        ]
        assert found
        if index == 0 and len(windows) > 1:  # the only window of a document ends with it, like every last one
            assert any(torch.equal(whole[: len(real)], real) for whole in found)
    assert EOS in windows[-1]  # wherever the pads push it, the end of a document is in its last window


def test_every_phase_comes_up() -> None:
    texts = CalmTexts(words(), [text(30)], 4, 4)
    torch.manual_seed(0)
    pads = {int((texts[0] == PAD).sum()) for _ in range(100)}
    assert pads == {0, 1, 2, 3}


def test_counts_names_and_fingerprints() -> None:
    texts = CalmTexts(words(), ["w2 w2 w3", "", "w5"], 2, 2)
    assert (len(texts), texts.tokens, texts.vocabulary, texts.pad, texts.eos) == (2, 6, 65, 64, 1)
    counts = texts.counts()
    assert [counts[i] for i in (1, 2, 3, 4, 5, 64)] == [2, 2, 1, 0, 1, 2] and len(counts) == 65
    assert texts.describe(1) == "text 3, window 1"
    prints = {
        CalmTexts(words(), documents, patch, chunks, phase=phase).fingerprint()
        for documents, patch, chunks, phase in [
            (["w2 w2 w3", "w5"], 2, 2, None), (["w2 w2 w4", "w5"], 2, 2, None), (["w2 w2 w3", "w5"], 3, 2, None),
            (["w2 w2 w3", "w5"], 2, 3, None), (["w2 w2 w3", "w5"], 2, 2, 0),
        ]
    }  # fmt: skip
    assert len(prints) == 5 and texts.fingerprint() in prints
    with pytest.raises(IndexError, match="window 2 of 2"):
        texts[2]


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text(9))
    seen: list[tuple[int, int]] = []
    texts = CalmTexts(words(), [tmp_path / "a.txt"], 2, 3, phase=0, progress=lambda *at: seen.append(at))
    assert texts[0].tolist() == ids(6) and texts.describe(1) == "a.txt, window 2" and seen == [(1, 1)]
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuickmergeError, match=r"b\.txt"):
        len(CalmTexts(words(), [tmp_path / "b.txt"], 2, 3))


@settings(max_examples=20, deadline=None)
@given(st.integers(8, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 50))
def test_no_window_shows_a_passage_that_is_held_out(length: int, patch: int, chunks: int, at: int) -> None:
    at = min(at, length - 5)
    row = ids(length)
    passage = row[at : at + 5]
    texts = CalmTexts(words(), [text(length), text(length, 31)], patch, chunks, held_out=[passage], passage=5)
    torch.manual_seed(0)
    shown = [texts[index].tolist() for index in range(len(texts)) for _ in range(8)]
    assert shown and not any(
        window[start : start + 5] == passage for window in shown for start in range(len(window) - 4)
    )


def test_windows_with_a_held_out_passage_are_counted() -> None:
    """Tokens 7 to 11 stand in no window of 8 tokens unless pads in front bring them into the second."""
    texts = CalmTexts(words(), [text(70)], 4, 2, held_out=[ids(70)[7:12]], passage=5)
    assert texts.overlapping == 1 and len(texts) == 8
    assert [texts.describe(index) for index in (0, 1)] == ["text 1, window 1", "text 1, window 3"]


def test_what_cannot_be_trained_on() -> None:
    with pytest.raises(QuickmergeError, match="there are no documents to train on"):
        len(CalmTexts(words(), ["", " "], 2, 2))
    with pytest.raises(QuickmergeError, match="share 5 tokens in a row with a held-out document"):
        len(CalmTexts(words(), [text(20)], 4, 8, held_out=[ids(20)], passage=5))
    with pytest.raises(QuickmergeError, match="tokenizer must have an end token"):
        CalmTexts(words(None), ["w2"], 2, 2)
    with pytest.raises(ValueError, match="phase must be a whole number from 0 to 1 or None, got 2"):
        CalmTexts(words(), ["w2"], 2, 2, phase=2)
    with pytest.raises(ValueError, match="chunks must be a whole number of at least 1, got 0"):
        CalmTexts(words(), ["w2"], 2, 0)


def test_chunks_of_texts() -> None:
    chunks = document_chunks(words(), ["w2 w3 w4", "w5"], 2)
    assert chunks.tolist() == [[2, 3], [4, 1], [5, 1]]
    assert document_chunks(words(), [], 3).shape == (0, 3)
