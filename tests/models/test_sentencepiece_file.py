"""Files in SentencePiece's format, set beside SentencePiece itself where it is installed."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import SENTENCES

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.tokenizer_files import sentencepiece_tokenizer
from quickmerge.transplant.tokens import read_vocabulary


def trained(path: Path, **settings: Any) -> Any:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 5), model_writer=model, minloglevel=2, hard_vocab_limit=False, **settings
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "bpe", "vocab_size": 450, "byte_fallback": True, "user_defined_symbols": ["<sep>"]},
        {"model_type": "bpe", "vocab_size": 450, "byte_fallback": True, "normalization_rule_name": "identity",
         "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True},
        {"model_type": "unigram", "vocab_size": 180},
        {"model_type": "unigram", "vocab_size": 430, "byte_fallback": True, "add_dummy_prefix": False},
    ],
)  # fmt: skip
def test_texts_are_cut_as_sentencepiece_cuts_them(settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = trained(tmp_path / "tokenizer.model", **settings)
    tokenizer = sentencepiece_tokenizer(tmp_path / "tokenizer.model")
    for text in (*SENTENCES, "a   b", " x ", "Grüße, 猫! ①"):
        assert tokenizer.encode(text, add_special_tokens=False) == theirs.encode(text)
    vocabulary = read_vocabulary(tokenizer)
    assert (vocabulary.alphabet, vocabulary.roles) == ("sentencepiece", {"unk": 0, "bos": 1, "eos": 2})
    assert vocabulary.size == theirs.get_piece_size()


def test_other_kinds_are_refused(tmp_path: Path) -> None:
    trained(tmp_path / "a.model", model_type="char", vocab_size=100)
    with pytest.raises(UnsupportedModelError, match="must be a BPE or a Unigram model"):
        sentencepiece_tokenizer(tmp_path / "a.model")
    trained(tmp_path / "b.model", model_type="bpe", vocab_size=200, treat_whitespace_as_suffix=True)
    with pytest.raises(UnsupportedModelError, match="puts the mark of a space behind words"):
        sentencepiece_tokenizer(tmp_path / "b.model")
    (tmp_path / "c.model").write_bytes(b"\x00\x01garbage")
    with pytest.raises(UnsupportedModelError, match=r"neither a tokenizer\.json nor a tiktoken file nor"):
        sentencepiece_tokenizer(tmp_path / "c.model")


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.is_sentencepiece_available", lambda: False)
    with pytest.raises(UnsupportedModelError, match="the packages sentencepiece and protobuf are needed"):
        sentencepiece_tokenizer(tmp_path / "a.model")
