"""Labels as tokens and back, with tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recognition_samples import NAMES, PROMPT, pieces, words
from strategies import prop

from quickmerge.errors import QuickmergeError
from quickmerge.recognition import LabelCodec

KINDS = ("words", "bytes", "metaspace", "wordpiece")
THINGS = [*NAMES, "red car", "traffic lights", "sunflower pot", "sunlight"]


def codec(kind: str = "words", prompt: str = PROMPT, separator: str = ",") -> LabelCodec:
    return LabelCodec(words() if kind == "words" else pieces(kind), prompt, separator)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_tokens_that_follow_the_prompt(kind: str) -> None:
    made = codec(kind)
    for label in ["cat", "red car", "traffic lights"]:
        whole = made.tokenizer(f"{PROMPT} {label},", add_special_tokens=False)["input_ids"]
        assert [*made.prompt_ids, *made.ids(label), made.sep] == whole
        assert made.text([*made.ids(label), made.sep]) == label
        assert bool(made.starts(len(made.tokenizer))[made.ids(label)[0]])


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_begin_a_label_is_barred(kind: str) -> None:
    made = codec(kind)
    starts = made.starts(len(made.tokenizer) + 3)
    assert starts.shape == (len(made.tokenizer) + 3,) and not bool(starts[-3:].any())
    assert not bool(starts[[made.sep, *made.tokenizer.all_special_ids]].any())
    for index in starts.nonzero()[:, 0].tolist():
        text = made.text([index])
        # a part of a character of several bytes has no text of its own
        assert text[:1].isalnum() or "�" in text or index == made.ids("7")[0]
    pieces_of = made.tokenizer.convert_ids_to_tokens(list(range(len(made.tokenizer))))
    if kind == "bytes":
        assert not any(bool(starts[i]) for i, piece in enumerate(pieces_of) if not piece.startswith("Ġ"))
    if kind == "wordpiece":
        assert any(piece.startswith("##") for piece in pieces_of)
        assert not any(bool(starts[i]) for i, piece in enumerate(pieces_of) if piece.startswith("##"))


@given(
    labels=st.lists(st.lists(st.sampled_from(THINGS), min_size=1, max_size=6), min_size=1, max_size=4),
    kind=st.sampled_from(["words", "bytes"]),
)
@prop(30)
def test_packed_labels_can_be_read_back(labels: list[list[str]], kind: str) -> None:
    made = CODECS[kind]
    if kind == "words":
        labels = [[label for label in row if "sun" not in label] or ["cat"] for row in labels]
    packed = made.encode(labels)
    assert packed.ids.shape == packed.group.shape == packed.valid.shape == packed.first.shape
    for row, names in enumerate(labels):
        unique = list(dict.fromkeys(names))
        assert int(packed.count[row]) == len(unique) == int(packed.first[row].sum()) == int(packed.closing[row].sum())
        for k, name in enumerate(unique, 1):
            own = packed.group[row] == k
            assert packed.ids[row][own].tolist() == [*made.ids(name), made.sep]
            assert packed.first[row][own].tolist() == [True] + [False] * len(made.ids(name))
            assert packed.closing[row][own].tolist() == [False] * len(made.ids(name)) + [True]
        used = sum(len(made.ids(name)) + 1 for name in unique)
        assert packed.valid[row].tolist() == [i < used for i in range(packed.ids.shape[1])]
        assert torch.equal(packed.group[row] > 0, packed.valid[row])


CODECS: dict[str, LabelCodec] = {kind: codec(kind) for kind in ("words", "bytes")}


def test_white_space_is_one_space_case_is_kept_and_twins_are_one() -> None:
    made = codec("bytes")
    packed = made.encode([["  red \t car ", "Red car", "red car"]])
    assert int(packed.count) == 2
    assert made.ids(" red  car") == made.ids("red car") != made.ids("Red car")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([], "labels must hold a list for at least one image, got none"),
        ([["cat"], []], "labels must name at least one label for each image, got none for image 1"),
        ([["cat", "  "]], "labels must not be empty, got ''"),
        ([["cat, dog"]], "a label must not hold the separator ',', which closes labels, got 'cat, dog'"),
        (["cat"], "labels must hold a list of labels for each image, got the text 'cat'"),
    ],
)
def test_labels_that_cannot_be_packed_are_told(labels: Any, message: str) -> None:
    with pytest.raises(QuickmergeError, match=message):
        codec().encode(labels)


@pytest.mark.parametrize("separator", [", and then", "zzz", "s"])
def test_a_separator_that_is_not_one_token_is_told(separator: str) -> None:
    with pytest.raises(QuickmergeError, match=f"separator must be one token .* which '{separator}' is not"):
        codec("bytes", separator=separator)


def test_another_separator_can_be_used() -> None:
    made = codec("bytes", separator=";")
    assert made.text([*made.ids("cat"), made.sep]) == "cat" and made.ids("cat, dog")


def test_a_separator_that_the_tokenizer_does_not_know_is_told() -> None:
    with pytest.raises(QuickmergeError, match="separator must be one token of its own"):
        codec("words", separator=";")


def test_a_prompt_of_nothing_is_told() -> None:
    with pytest.raises(QuickmergeError, match="prompt must hold at least one token, got ''"):
        codec(prompt="")


def test_the_text_begins_with_bos_where_there_is_one() -> None:
    tokenizer = words()
    assert LabelCodec(tokenizer, PROMPT, ",").start_ids == [tokenizer.bos_token_id]
    tokenizer.bos_token = None
    assert LabelCodec(tokenizer, PROMPT, ",").start_ids == []


def test_of_smollm2_the_comma_closes_labels_and_words_begin_them(smollm2: tuple[Any, Any]) -> None:
    model, tokenizer = smollm2
    made = LabelCodec(tokenizer, "The objects in the image are", ",")
    assert tokenizer.decode([made.sep]) == ","
    starts = made.starts(model.config.vocab_size)
    assert 20_000 < int(starts.sum()) < 40_000
    for label in ("dog", "fire hydrant", "Golden retriever", "3d printer", "éclair"):
        assert bool(starts[made.ids(label)[0]]) and made.text(made.ids(label)) == label
