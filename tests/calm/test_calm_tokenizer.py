"""Tokenizers of a CALM: made of the training text, or read from what the user names."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from quickmerge.calm.texts import END, read_tokenizer, train_tokenizer
from quickmerge.errors import QuickmergeError

TEXTS = ["the sea and the sand and the sea" * 3, "Übermut tut selten gut\n\t", "def f(x):\n    return x"]


def test_it_writes_any_text_and_is_read_again(tmp_path: Path) -> None:
    made = train_tokenizer(TEXTS, 280)
    assert len(made) == 280 and made.eos_token == END and made.eos_token_id == 0
    for text in [*TEXTS, "語 🌊  \r\n", "unseen zebra"]:
        ids = made(text)["input_ids"]
        assert made.decode(ids, clean_up_tokenization_spaces=False) == text and max(ids) < 280
    assert len(made(TEXTS[0])["input_ids"]) < len(TEXTS[0]) / 2
    assert train_tokenizer(TEXTS, 280).get_vocab() == made.get_vocab()
    made.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = read_tokenizer(str(name))
        assert again.get_vocab() == made.get_vocab() and again.eos_token_id == 0
        assert again(TEXTS[1])["input_ids"] == made(TEXTS[1])["input_ids"]


def test_a_file_alone_is_read(tmp_path: Path) -> None:
    train_tokenizer(TEXTS, 270).backend_tokenizer.save(str(tmp_path / "bare.json"))
    again = read_tokenizer(str(tmp_path / "bare.json"))
    assert again.eos_token == END and len(again) == 270
    (tmp_path / "no").mkdir()
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "no" / "end.json"))
    with pytest.raises(QuickmergeError, match="must have an end token"):
        read_tokenizer(str(tmp_path / "no" / "end.json"))


def test_files_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXTS[0])
    assert train_tokenizer([tmp_path / "a.txt"], 260).get_vocab() == train_tokenizer(TEXTS[:1], 260).get_vocab()


def test_what_cannot_be_made_or_read(tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="vocabulary must be at most 257, as many different tokens as the texts"):
        train_tokenizer(["a"], 300)
    with pytest.raises(ValueError, match="vocabulary must be a whole number of at least 257, got 100"):
        train_tokenizer(TEXTS, 100)
    (tmp_path / "broken.json").write_text("{")
    for name in (str(tmp_path / "broken.json"), str(tmp_path / "nothing"), "no such model"):
        with pytest.raises(QuickmergeError, match=r"tokenizer must be a model's name, a folder or a tokenizer\.json"):
            read_tokenizer(name)
