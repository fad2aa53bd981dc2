"""Annotated images: what is read, and every defect told with file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from strategies import prop

from quickmerge.datasets.annotated import Annotated, Question, read_annotated
from quickmerge.errors import QuickmergeError

LINE = '{"image": "a.png", "labels": ["cat"]}'


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "set" / "sub").mkdir(parents=True)
    for name in ("set/a.png", "set/sub/b.png", "outside.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    return tmp_path / "set"


def write(folder: Path, *lines: str) -> Path:
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_labels_and_questions_are_read_in_their_order(folder) -> None:
    asked = {"kind": "where", "question": "Where is the sea?", "answer": "left"}
    read = read_annotated(write(
        folder,
        json.dumps({"image": "sub/b.png", "labels": ["sea", "red boat"], "questions": [asked], "licence": "CC0"}),
        "",
        '{"image": "./a.png", "questions": [{"question": " What? ", "answer": "é\u2028e "}]}',
        LINE,
    ))  # fmt: skip
    assert read == [
        Annotated(folder / "sub/b.png", ("sea", "red boat"), (Question("where", "Where is the sea?", "left"),)),
        Annotated(folder / "a.png", (), (Question("other", "What?", "é\u2028e"),)),
        Annotated(folder / "a.png", ("cat",), ()),
    ]
    with pytest.raises(AttributeError):
        read[0].path = Path()  # type: ignore[misc]


def test_windows_lines_and_a_byte_order_mark_are_no_defect(folder) -> None:
    (folder / "annotations.jsonl").write_bytes(b"\xef\xbb\xbf" + LINE.encode() + b"\r\n" + LINE.encode())
    assert len(read_annotated(folder)) == 2


def test_a_linked_image_is_inside(folder, tmp_path) -> None:
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    assert read_annotated(write(folder, '{"image": "link.png", "labels": ["x"]}'))[0].path == folder / "link.png"


QUESTION = '{"image": "a.png", "questions": [%s]}'
DEFECTS = {
    "{": "must be JSON",
    "nonsense": "must be JSON",
    "[" * 100_000: "must be JSON",
    "[1]": "must be a JSON object",
    "7": "must be a JSON object",
    '{"labels": ["x"]}': "lacks 'image'",
    '{"image": 3, "labels": ["x"]}': "image in .* must be a string",
    '{"image": "", "labels": ["x"]}': "image in .* must be a string that is not empty",
    '{"image": "gone.png", "labels": ["x"]}': "'gone.png' .* is not in",
    '{"image": "sub", "labels": ["x"]}': "'sub' .* is not in",
    '{"image": "a\\u0000.png", "labels": ["x"]}': "is not in",
    '{"image": "../outside.png", "labels": ["x"]}': "must be a file inside",
    '{"image": "sub/../../outside.png", "labels": ["x"]}': "must be a file inside",
    '{"image": "/etc/hostname", "labels": ["x"]}': "must be a file inside",
    '{"image": "a.png"}': "labels or questions, got neither",
    '{"image": "a.png", "labels": [], "questions": []}': "labels or questions, got neither",
    '{"image": "a.png", "labels": "cat"}': 'labels in .* must be a list, got "cat"',
    '{"image": "a.png", "labels": null}': "labels in .* must be a list, got null",
    '{"image": "a.png", "labels": ["cat", 1]}': "each label in .* must be a string that is not empty, got 1",
    '{"image": "a.png", "labels": ["cat", " "]}': "each label in .* must be a string that is not empty",
    '{"image": "a.png", "questions": {}}': "questions in .* must be a list",
    QUESTION % '"What?"': 'each question in .* must be a JSON object, got "What',
    QUESTION % '{"answer": "x"}': "lacks 'question'",
    QUESTION % '{"question": "What?"}': "lacks 'answer'",
    QUESTION % '{"question": "What?", "answer": "  "}': "answer in .* must be a string that is not empty",
    QUESTION % '{"question": "What?", "answer": 4}': "answer in .* must be a string that is not empty, got 4",
    QUESTION % '{"question": "What?", "answer": "x", "kind": []}': "kind in .* must be a string",
    QUESTION % '{"question": false, "answer": "x"}': "question in .* must be a string",
}  # fmt: skip


@pytest.mark.parametrize("line", DEFECTS, ids=lambda line: line[:50])
def test_every_defect_is_one_sentence_with_file_and_line(folder, line: str) -> None:
    with pytest.raises(QuickmergeError, match=DEFECTS[line]) as told:
        read_annotated(write(folder, LINE, "", line))
    assert f"line 3 of {folder / 'annotations.jsonl'}" in str(told.value)
    assert "\n" not in str(told.value) and len(str(told.value)) < 400


def test_a_missing_an_empty_and_a_binary_file_are_told(folder) -> None:
    with pytest.raises(QuickmergeError, match="there is no file"):
        read_annotated(folder)
    with pytest.raises(QuickmergeError, match="there is no file"):
        read_annotated(folder / "gone")
    with pytest.raises(QuickmergeError, match="is empty"):
        read_annotated(write(folder, "", " "))
    (folder / "annotations.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuickmergeError, match="UTF-8"):
        read_annotated(folder)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from(["image", "labels", "questions", "kind", "question", "answer"])


@prop(100)
@given(st.dictionaries(keys, json_values | st.just("a.png") | st.dictionaries(keys, json_values).map(lambda d: [d])))
def test_anything_is_either_read_or_told(tmp_path_factory, entry) -> None:
    folder = tmp_path_factory.getbasetemp() / "anything"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").touch()
    try:
        (read,) = read_annotated(write(folder, json.dumps(entry)))
    except QuickmergeError as error:
        assert "line 1 of" in str(error)
    else:
        assert read.path.is_file() and (read.labels or read.questions)
        assert all(q.kind and q.question and q.answer for q in read.questions)


@pytest.mark.parametrize(
    "box", ["[0, 0, 1e400, 1]", "[0, 0, NaN, 1]", f"[0, 0, {10**400}, 1]", "[true, 0, 2, 2]", "[0, 0, 2e9, 1]"]
)
def test_a_box_of_no_places_is_told(folder, box: str) -> None:
    line = f'{{"image": "a.png", "labels": ["cat"], "objects": [{{"text": "a", "box": {box}}}]}}'
    with pytest.raises(QuickmergeError, match=r"box in line 1 of .*annotations\.jsonl must be the left, top"):
        read_annotated(write(folder, line))


@pytest.mark.parametrize("key", ["labels", "question", "answer", "text"])
def test_half_a_character_is_told(folder, key: str) -> None:
    half = "a\\ud800"
    entry = {
        "labels": f'"labels": ["{half}"]', "question": f'"questions": [{{"question": "{half}", "answer": "b"}}]',
        "answer": f'"questions": [{{"question": "b", "answer": "{half}"}}]',
        "text": f'"labels": ["c"], "objects": [{{"text": "{half}", "box": [0, 0, 1, 1]}}]',
    }  # fmt: skip
    with pytest.raises(QuickmergeError, match=r"line 1 of .*annotations\.jsonl must be text, got half a character in"):
        read_annotated(write(folder, f'{{"image": "a.png", {entry[key]}}}'))
