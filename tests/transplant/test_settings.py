from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.transplant.settings import choose_template, former_ids, new_settings

IDS = {10: 1, 11: 2, 12: 3}


def test_ids_are_translated_wherever_they_stand() -> None:
    base = {
        "vocab_size": 99, "bos_token_id": 10, "eos_token_id": [11, 12, 50], "pad_token_id": 50, "hidden_size": 8,
        "text_config": {"vocab_size": 99, "eos_token_id": 11, "num_hidden_layers": 2}, "image_token_id": 12,
        "suppress_tokens": [10, 50], "bad_words_ids": [[10, 11], [10, 50]], "sep_token_id": 50, "use_cache": True,
    }  # fmt: skip
    new, notes = new_settings(base, IDS, {"eos": 7}, size=20)
    assert new == {
        "vocab_size": 20, "bos_token_id": 1, "eos_token_id": [7, 2, 3], "pad_token_id": None, "hidden_size": 8,
        "text_config": {"vocab_size": 20, "eos_token_id": 7, "num_hidden_layers": 2}, "image_token_id": 3,
        "suppress_tokens": [1], "bad_words_ids": [[1, 2]], "sep_token_id": None, "use_cache": True,
    }  # fmt: skip
    assert notes == [
        "pad_token_id: the new vocabulary has none", "suppress_tokens: 1 of 2 have no counterpart",
        "bad_words_ids: 1 of 2 have no counterpart", "sep_token_id: the new vocabulary has none",
    ]  # fmt: skip
    assert base["vocab_size"] == 99 and base["text_config"]["vocab_size"] == 99  # type: ignore[index]


def test_roles_of_the_tokenizer_are_set_where_the_base_has_none() -> None:
    new, notes = new_settings({"bos_token_id": None}, {}, {"bos": 4, "pad": 0, "eos": 5, "mask": 6}, size=None)
    assert new == {"bos_token_id": 4, "eos_token_id": 5, "pad_token_id": 0} and notes == []


def test_a_token_that_the_model_needs_must_have_a_counterpart() -> None:
    with pytest.raises(QuickmergeError, match=r"counterpart of the base's image_token_id \(50\), got none"):
        new_settings({"image_token_id": 50}, IDS, {}, size=None)


def test_special_tokens_come_before_what_reads_alike() -> None:
    assert former_ids(np.array([[5, 1], [2, 1], [3, 0]]), {9: (0,), 8: (1, 2)}) == {0: 9, 1: 2}


def tokenizer(template: str | None, *markers: str, **roles: str | None) -> Any:
    class Marker(str):
        special = True

    named = {"bos_token": None, "eos_token": None, "pad_token": None, **roles}
    return SimpleNamespace(chat_template=template, added_tokens_decoder=dict(enumerate(map(Marker, markers))), **named)


def test_the_template_of_the_base_is_kept_where_its_markers_are() -> None:
    base = tokenizer("<|a|>{{ x }}<|b|>{{ eos_token }}", "<|a|>", "<|b|>", "<|c|>", eos_token="<|b|>")
    kept = choose_template(base, tokenizer("theirs", "<|a|>", "<|b|>", eos_token="<|b|>"))
    assert (kept.text, kept.source) == (base.chat_template, "base")
    theirs = choose_template(base, tokenizer("theirs", "<|a|>", eos_token="<|b|>"))
    assert (theirs.text, theirs.source) == ("theirs", "tokenizer") and "lacks <|b|>" in theirs.why
    no_end = choose_template(base, tokenizer("theirs", "<|a|>", "<|b|>"))
    assert no_end.source == "tokenizer" and "lacks eos_token" in no_end.why
    none = choose_template(base, tokenizer(None))
    assert (none.text, none.source) == (None, "none")
    assert choose_template(tokenizer(None), tokenizer("theirs")).source == "tokenizer"
    assert choose_template(tokenizer(None), tokenizer(None)).source == "none"
