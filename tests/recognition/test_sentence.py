"""The sentence encoder: padding and batches change nothing, and nothing is read twice."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from quickmerge.errors import FetchError, QuickmergeError, UnsupportedModelError
from quickmerge.recognition.sentence import SentenceEncoder

TEXTS = ["red circle", "digit", "a red circle and a digit", "circle", "unheard of"]


@pytest.fixture
def encoder() -> SentenceEncoder:
    words = ["[PAD]", "[UNK]", "red", "circle", "digit", "a", "and"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.enable_padding(length=32)  # as the published tokenizer has it: a batch must not be padded so far
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[PAD]")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return SentenceEncoder(BertModel(BertConfig(vocab_size=7, **sizes), add_pooling_layer=False), tokenizer, batch=3)


def test_a_batch_is_each_text_alone_in_float64(encoder: SentenceEncoder) -> None:
    found = encoder(TEXTS)
    model = encoder.model.double()
    for text, row in zip(TEXTS, found, strict=True):
        ids = encoder.tokenizer(text, padding=False)["input_ids"]
        with torch.no_grad():
            hidden = model(torch.tensor([ids])).last_hidden_state[0]
        mean = sum(hidden) / len(hidden)
        assert torch.allclose(row.double(), mean / mean.norm(), atol=1e-5)
    assert torch.allclose(found.norm(dim=-1), torch.ones(len(TEXTS)))


def test_what_is_known_is_not_read_again(encoder: SentenceEncoder) -> None:
    calls = []
    encoder.model.register_forward_hook(lambda *args: calls.append(1))
    first = encoder(TEXTS + TEXTS)
    assert len(calls) == 2 and torch.equal(first[:5], first[5:])
    assert torch.equal(encoder(TEXTS[::-1]), first[:5].flip(0)) and len(calls) == 2
    assert encoder([]).shape == (0, 16)


def test_what_is_no_text_or_no_encoder(encoder: SentenceEncoder, tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="got an empty one"):
        encoder(["red", "  "])
    with pytest.raises(QuickmergeError, match="each of the texts to embed must be a text"):
        encoder(["red", "a\ud800"])
    with pytest.raises(UnsupportedModelError, match=r"an embedded name \(minilm-l6\) or a folder, got 'minilm'"):
        SentenceEncoder.load("minilm")
    with pytest.raises(UnsupportedModelError, match="has no usable tokenizer"):
        SentenceEncoder.load(tmp_path)
    with pytest.raises(ValueError, match="batch must be"):
        SentenceEncoder(encoder.model, encoder.tokenizer, batch=0)


def test_a_saved_encoder_is_the_same(encoder: SentenceEncoder, tmp_path: Path) -> None:
    encoder.model.save_pretrained(tmp_path)
    encoder.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(SentenceEncoder.load(tmp_path)(TEXTS), encoder(TEXTS))


@pytest.mark.slow
def test_the_real_encoder_knows_what_is_alike() -> None:
    try:
        encode = SentenceEncoder.load(progress=False)
    except FetchError as error:
        pytest.skip(f"the weights of minilm-l6 cannot be fetched: {error}")
    dog, puppy, spoon = encode(["a dog", "a puppy", "a spoon"])
    assert dog @ puppy > 0.7 > 0.4 > dog @ spoon
