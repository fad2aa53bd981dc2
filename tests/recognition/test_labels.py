"""Labels as tokens and back, with tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from recognition_samples import NAMES, PROMPT, pieces, words
from strategies import prop
from tokenizer_samples import byte_level, from_words, sentencepiece_bpe

from quickmerge.errors import QuickmergeError
from quickmerge.models.tokenizers import printable_bytes
from quickmerge.recognition import LabelCodec

KINDS = ("words", "bytes", "metaspace", "wordpiece")
BYTES = {byte: ord(character) for character, byte in printable_bytes().items()}
LEADS = (
    b"\xd7", b"\xc2", b"\xf0\x90", b"\xe2\x80", b"\xc3\x97", b"\xc3\xa9", b"\x80", b"\xff", b"\xe2\x82\xac",
    b"\xf0\x9f\x98",
)  # fmt: skip
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


def of_script(letters: str) -> st.SearchStrategy[str]:
    return st.text(letters, min_size=1, max_size=6)


SCRIPTS = {
    "Hebrew": "אבגדהוזחט", "Arabic": "ابتثجحخدذ", "Cyrillic": "абвгдежзи", "Greek": "αβγδεζηθι", "Armenian": "աբգդեզ",
    "Georgian": "აბგდევზ", "Devanagari": "अआइईकखग", "Bengali": "অআইঈকখগ", "Tamil": "அஆஇஈகஙச", "Thai": "กขฃคฅฆง",
    "Khmer": "កខគឃង", "Tibetan": "ཀཁགང", "Ethiopic": "ሀለሐመ", "Cherokee": "ᎠᎡᎢᎣ", "Han": "猫犬山川",
    "kana": "あいうアイウ", "Hangul": "고양이개",
    "Syriac": "ܐܒܓܕ", "Thaana": "ހށނރ", "N'Ko": "ߊߋߌߍ", "Gothic": "𐌰𐌱𐌲", "cuneiform": "𒀀𒀁𒀂",
    "hieroglyphs": "𓀀𓀁𓀂", "Adlam": "𞤀𞤁𞤂", "rare Han": "𠀀𠀁𪛖", "Vai": "ꔀꔁꔂ", "Deseret": "𐐀𐐁𐐂", "Latin": "æœþđŋ",
}  # fmt: skip
EVERY = {
    "byte-level": LabelCodec(byte_level(), "the cat and", ","),
    "byte-level, hardly trained": LabelCodec(byte_level(300), "the cat and", ","),
    "SentencePiece": LabelCodec(sentencepiece_bpe(), "the cat and", ","),
    "SentencePiece, in front of the first": LabelCodec(sentencepiece_bpe(way="metaspace"), "the cat and", ","),
}
STARTS = {kind: made.starts(len(made.tokenizer)) for kind, made in EVERY.items()}


@pytest.mark.parametrize("kind", EVERY)
@prop(60)
@given(st.one_of(*map(of_script, SCRIPTS.values()), st.text(st.characters(categories=("L",)), min_size=1, max_size=6)))
def test_a_label_of_letters_of_any_script_can_be_said(kind: str, label: str) -> None:
    made, starts = EVERY[kind], STARTS[kind]
    ids = made.ids(label)
    assert bool(starts[ids[0]])
    assert not set(ids) & {made.sep, *made.special.tolist()}
    assert made.text(ids) == label


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_letter_of_a_script_can_begin_a_label(kind: str, script: str) -> None:
    assert all(bool(STARTS[kind][EVERY[kind].ids(letter)[0]]) for letter in SCRIPTS[script])


def test_bytes_that_begin_no_letter_begin_no_label() -> None:
    """Of a byte-level piece the bytes are judged, and not the letters that stand for them."""
    words = {"Ġ" + "".join(chr(BYTES[b]) for b in data): index for index, data in enumerate(LEADS)}
    made = LabelCodec(from_words({**words, "Ġcat": len(words)}), "cat", ",")
    starts = made.starts(len(made.tokenizer))
    said = {data: bool(starts[index]) for index, data in enumerate(LEADS)}
    assert {data for data, begins in said.items() if begins} == {b"\xd7", b"\xc2", b"\xf0\x90", b"\xc3\xa9"}


@pytest.mark.parametrize("label", ["a\ud800", "\udfff", 7, None, b"cat", ["cat"]])
def test_a_label_that_is_no_text_is_told(label: Any) -> None:
    for made in (codec("bytes"), EVERY["SentencePiece"]):
        with pytest.raises(QuickmergeError, match=r"^a label must be a text"):
            made.encode([[label]])
        with pytest.raises(QuickmergeError, match=r"^a label must be a text"):
            made.ids(label)


@pytest.mark.parametrize("name", ["prompt", "separator"])
def test_settings_that_are_no_text_are_told(name: str) -> None:
    with pytest.raises(QuickmergeError, match=rf"^{name} must be a text of whole characters, got half of one in"):
        codec("bytes", **{name: "a\ud800"})


def test_labels_and_ids_of_numpy_are_taken() -> None:
    made = codec("bytes")
    packed = made.encode(np.array([["cat", "dog"], ["cat", "red car"]]))  # type: ignore[arg-type]
    assert torch.equal(packed.ids, made.encode([["cat", "dog"], ["cat", "red car"]]).ids)
    assert made.text(np.array(made.ids("red car"))) == "red car"  # type: ignore[arg-type]


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
