import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.datasets import TextWindows, overlap
from quickmerge.errors import QuickmergeError


class Letters:
    """A tokenizer that makes a token of each character, and remembers what it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        self.seen.append(text)
        return {"input_ids": [ord(letter) for letter in text]}


def text_of(windows: TextWindows) -> list[str]:
    return ["".join(map(chr, windows[at].tolist())) for at in range(len(windows))]


texts = st.lists(st.text("abc", max_size=30), max_size=5)


@given(texts, st.integers(1, 8))
def test_windows_cover_each_document_in_order_without_overlap(documents: list[str], length: int) -> None:
    whole = [text[at : at + length] for text in documents for at in range(0, len(text) // length * length, length)]
    windows = TextWindows(Letters(), documents, length)
    if whole:
        assert text_of(windows) == whole
        assert windows.skipped == sum(len(text) < length for text in documents)
        assert windows.overlapping == 0
    else:
        with pytest.raises(QuickmergeError):
            len(windows)


@given(texts, st.integers(1, 8), st.integers(1, 10))
def test_stride(documents: list[str], length: int, stride: int) -> None:
    whole = [text[at : at + length] for text in documents for at in range(0, len(text) - length + 1, stride)]
    if whole:
        assert text_of(TextWindows(Letters(), documents, length, stride=stride)) == whole


@given(texts, st.integers(1, 8), texts, st.integers(1, 5))
def test_windows_that_share_a_passage_with_a_held_out_document_are_dropped(
    documents: list[str], length: int, held_out: list[str], passage: int
) -> None:
    def shares(window: str) -> bool:
        return any(overlap(list(map(ord, window)), list(map(ord, text)), passage) for text in held_out)

    whole = [text[at : at + length] for text in documents for at in range(0, len(text) // length * length, length)]
    kept = [window for window in whole if not shares(window)]
    hidden = [list(map(ord, text)) for text in held_out]
    windows = TextWindows(Letters(), documents, length, held_out=hidden, passage=passage)
    if kept:
        assert text_of(windows) == kept
        assert windows.overlapping == len(whole) - len(kept)
    elif whole:
        with pytest.raises(QuickmergeError, match=f"all {len(whole)} windows share {passage} tokens in a row"):
            len(windows)


def test_files_are_read_once_and_only_when_needed(tmp_path: Path) -> None:
    files = [tmp_path / "whale.txt", tmp_path / "sea.txt"]
    files[0].write_text("\ufeffabcdefg", encoding="utf-8")
    files[1].write_text("ab")
    tokenizer, told = Letters(), list[tuple[int, int]]()
    windows = TextWindows(tokenizer, files, 3, progress=lambda done, of: told.append((done, of)))
    assert not tokenizer.seen
    assert windows[1].tolist() == [100, 101, 102]
    assert windows[-1].dtype == torch.int64
    assert windows.describe(1) == "whale.txt, tokens 3-6"
    assert (len(windows), windows.skipped) == (2, 1)
    assert tokenizer.seen == ["abcdefg", "ab"]
    assert told == [(1, 2), (2, 2)]
    with pytest.raises(IndexError):
        windows[2]
    assert len(list(windows)) == 2


def test_texts_are_called_by_their_number() -> None:
    assert TextWindows(Letters(), ["a", "bcd"], 3).describe(0) == "text 2, tokens 0-3"


def test_the_fingerprint_tells_other_data() -> None:
    def fingerprint(documents: Sequence[str], length: int = 2, **settings: Any) -> str:
        return TextWindows(Letters(), documents, length, **settings).fingerprint()

    same = fingerprint(["abcd", "efgh"])
    assert same == fingerprint(["abcd", "efgh"])
    assert len(same) == 64
    others = [
        fingerprint(["abcd", "efgi"]),
        fingerprint(["efgh", "abcd"]),
        fingerprint(["abcd", "efgh"], 4),
        fingerprint(["abcd", "efgh"], stride=1),
        fingerprint(["abcd", "efgh"], held_out=[[ord("a"), ord("b")]], passage=2),
    ]
    assert len({same, *others}) == 6


def test_all_too_short_says_what_is_needed() -> None:
    windows = TextWindows(Letters(), ["abc", "abcd"], 5)
    with pytest.raises(QuickmergeError, match="of at least 5 tokens, and the longest of 2 has 4"):
        len(windows)
    with pytest.raises(QuickmergeError, match="no documents"):
        len(TextWindows(Letters(), [], 5))


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    for content, reason in ((b"abc\xff", "other bytes at offset 3"), (b"ab\0c", "a zero byte at offset 2")):
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(QuickmergeError, match=f"a.txt must be .*{reason}"):
            len(TextWindows(Letters(), [tmp_path / "a.txt"], 2))
    with pytest.raises(QuickmergeError, match=r"gone\.txt can't be read: No such file"):
        len(TextWindows(Letters(), [tmp_path / "gone.txt"], 2))


@pytest.mark.parametrize("settings", [{"length": 0}, {"length": 2, "stride": 0}, {"length": 2.5}])
def test_numbers_are_checked_at_once(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be a whole number of at least 1"):
        TextWindows(Letters(), ["abc"], **settings)


def test_a_tokenizer_of_transformers_adds_nothing_and_does_not_warn(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "the": 1, "sea": 2, "<unk>": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", model_max_length=2)
    caplog.set_level(logging.WARNING, logger="transformers")
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    windows = TextWindows(tokenizer, ["the sea the whale"], 2)
    assert [windows[at].tolist() for at in range(2)] == [[1, 2], [1, 3]]
    assert not caplog.records
