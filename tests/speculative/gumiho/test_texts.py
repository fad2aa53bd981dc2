"""Texts for draft heads: what counts, batches, frequent tokens, and features that are read once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from quickmerge.datasets import TextWindows
from quickmerge.errors import QuickmergeError
from quickmerge.speculative.gumiho import texts as draft_texts
from quickmerge.speculative.gumiho.self_answers import Answered
from quickmerge.speculative.gumiho.texts import DraftTexts, collate_texts, keep_features

ANSWERS = [
    Answered((5, 6, 7), (8, 9, 1)),
    Answered((5, 6), (7,)),
    Answered((2,), (3, 4, 5, 6)),
    Answered((2, 3), tuple(range(20))),
]


def windows(length: int = 6, count: int = 4) -> TextWindows:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    text = " ".join(f"w{5 + i % 50}" for i in range(length * count))
    return TextWindows(PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0"), [text], length)


def test_features_that_predict_the_answer_count() -> None:
    texts = DraftTexts(None, ANSWERS, length=10)
    shown = [(item["ids"].tolist(), item["counts"].int().tolist()) for item in (texts[i] for i in range(len(texts)))]
    assert shown == [
        ([5, 6, 7, 8, 9, 1], [0, 0, 1, 1, 1, 0]),
        ([5, 6, 7], [0, 1, 0]),
        ([2, 3, 4, 5, 6], [0, 1, 1, 1, 0]),  # the first token of this answer is predicted by what nobody guesses
        ([2, 3, *range(8)], [0, *[1] * 8, 0]),
    ]
    assert texts.tokens == 24 and texts.describe(2) == "answer 3" and texts.largest == 9
    assert len(DraftTexts(None, [*ANSWERS, Answered((4,), (5,)), Answered(tuple(range(12)), (5, 6))], length=10)) == 4


def test_windows_count_everywhere_and_may_be_drawn() -> None:
    texts = DraftTexts(windows(), ANSWERS, length=10)
    assert (texts.plain, len(texts)) == (4, 8)
    assert texts[1]["ids"].tolist() == [11, 12, 13, 14, 15, 16]
    assert texts[1]["counts"].int().tolist() == [0, 1, 1, 1, 1, 0]
    assert texts.describe(1) == "text 2" and texts.describe(4) == "answer 1"
    some = DraftTexts(windows(), length=10, most=2, seed=1)
    assert len(some) == 2 and some.fingerprint() == DraftTexts(windows(), length=10, most=2, seed=1).fingerprint()
    assert len({DraftTexts(windows(), length=10, most=2, seed=seed).fingerprint() for seed in range(6)}) > 1
    assert texts.fingerprint() != DraftTexts(windows(), ANSWERS[:2], length=10).fingerprint()


def test_batches_are_padded_behind() -> None:
    texts = DraftTexts(None, ANSWERS, length=10)
    texts.keep(torch.arange(24 * 3).view(24, 3).bfloat16())
    batch = collate_texts([texts[2], texts[0]])
    assert batch["ids"].tolist() == [[2, 3, 4, 5, 6, 0], [5, 6, 7, 8, 9, 1]]
    assert batch["counts"].int().tolist() == [[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert batch["features"].shape == (2, 6, 3) and batch["features"][0, :5, 0].tolist() == [27, 30, 33, 36, 39]
    assert not bool(batch["features"][0, 5].any())
    with pytest.raises(ValueError, match=r"features must be \(24, H\) for these texts, got \(20, 3\)"):
        texts.keep(torch.zeros(20, 3))


def test_frequent_tokens_are_those_that_are_predicted() -> None:
    texts = DraftTexts(None, [Answered((9, 9, 9, 9), (5, 6, 5, 7)), Answered((9, 9), (5, 6, 8))], length=10)
    ids, share = texts.frequent(2)
    assert ids.tolist() == [5, 6] and share == 5 / 7
    ids, share = texts.frequent(50)
    assert ids.tolist() == [5, 6, 7, 8] and share == 1.0


def test_nothing_to_learn_from() -> None:
    with pytest.raises(QuickmergeError, match="there are no texts to train draft heads on"):
        DraftTexts(None, [Answered((4,), (5,))], length=10)
    with pytest.raises(ValueError, match="length must be a whole number of at least 3, got 2"):
        DraftTexts(None, ANSWERS, length=2)


def alone(model: Any, texts: DraftTexts, index: int) -> Tensor:
    with torch.no_grad():
        return model.base_model(texts[index]["ids"][None]).last_hidden_state[0]


@pytest.mark.parametrize("on_disk", [False, True])
def test_features_are_those_of_each_text_alone(tiny_llama: Any, tmp_path: Path, on_disk: bool) -> None:
    texts, seen = DraftTexts(windows(), ANSWERS, length=10), []
    keep_features(tiny_llama, texts, {}, folder=tmp_path if on_disk else None, batch=3, advance=seen.append)
    assert seen == [0, 3, 3, 2]
    for index in range(len(texts)):
        features = texts[index]["features"]
        assert features.dtype == torch.bfloat16
        torch.testing.assert_close(features.float(), alone(tiny_llama, texts, index), atol=0.02, rtol=0.01)


def test_features_on_disk_are_read_once(tiny_llama: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was killed goes on, the next one reads nothing, and other texts or models are told apart."""
    known, passes = {"model": "tiny"}, []
    tiny_llama.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    texts = DraftTexts(windows(), ANSWERS, length=10)

    class KilledError(Exception):
        pass

    def die(count: int) -> None:
        if len(passes) == 2:
            raise KilledError

    with pytest.raises(KilledError):
        keep_features(tiny_llama, texts, known, folder=tmp_path, batch=2, advance=die)
    keep_features(tiny_llama, texts, known, folder=tmp_path, batch=2)
    assert len(passes) == 4
    again = DraftTexts(windows(), ANSWERS, length=10)
    keep_features(tiny_llama, again, known, folder=tmp_path, batch=2)
    assert len(passes) == 4
    for index in range(len(texts)):
        assert torch.equal(texts[index]["features"], again[index]["features"])
        torch.testing.assert_close(
            again[index]["features"].float(), alone(tiny_llama, texts, index), atol=0.02, rtol=0.01
        )
    for other, settings, what in [(texts, {"model": "b"}, "model"), (DraftTexts(windows(), length=10), known, "texts")]:
        with pytest.raises(QuickmergeError, match=rf"features of other texts or of another model \({what} differs\)"):
            keep_features(tiny_llama, other, settings, folder=tmp_path, batch=2)
    (tmp_path / draft_texts.VALUES).write_bytes(b"cut")
    passes.clear()
    keep_features(tiny_llama, texts, known, folder=tmp_path, batch=2)
    assert len(passes) == 4  # values that are not whole are read again
    (tmp_path / draft_texts.LIST).write_text("{")
    with pytest.raises(QuickmergeError, match="must be JSON"):
        keep_features(tiny_llama, texts, known, folder=tmp_path, batch=2)
    (tmp_path / "file").write_text("")
    with pytest.raises(QuickmergeError, match="can't be written"):
        keep_features(tiny_llama, texts, known, folder=tmp_path / "file")
    assert np.dtype(np.int16).itemsize * texts.tokens * 32 == (tmp_path / draft_texts.VALUES).stat().st_size
