"""Prompts made of documents: the same every time, of every kind, and of what the documents say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.datasets.prompts import TASKS, Prompt, Source, document_prompts, passage, read_prompts
from quickmerge.errors import QuickmergeError

PROSE = " ".join(
    f"The captain sailed past island number {n} in the evening. Nobody on the island said {n} words." for n in range(80)
)
CODE = "\n\n".join(f"def step_{n}(value):\n    return value + {n}" for n in range(80))


def documents() -> list[Source]:
    kinds = {"prose": PROSE, "technical": PROSE, "code": CODE}
    return [
        Source(f"{kind}-{n:02}", kind, text.replace("island", f"{kind}{n}").replace("value", f"value{n}"))
        for kind, text in kinds.items()
        for n in range(12)
    ]


def test_the_first_prompts_are_as_many_of_each_kind_and_no_two_equal() -> None:
    prompts = document_prompts(documents(), 96)
    assert Counter(p.kind for p in prompts) == dict.fromkeys(TASKS, 12)
    assert len({p.text for p in prompts}) == 96
    assert document_prompts(documents()[::-1], 96) == prompts, "the order of the documents does not matter"
    assert document_prompts(documents(), 30) == prompts[:30]
    assert all("{" not in p.text for p in prompts if p.kind not in ("code", "explain"))


def test_every_wording_of_a_task_is_used() -> None:
    texts = [p.text for p in document_prompts(documents(), 96)]
    for task in TASKS.values():
        for wording in task.wordings:
            fixed = max(wording.replace("\n", "{").split("{"), key=len)  # the longest part that holds no passage
            assert any(fixed.partition("}")[2] in text for text in texts), wording


def test_a_passage_stands_in_its_document_from_sentence_to_sentence() -> None:
    found = passage(PROSE, 0.4, 500)
    assert found in PROSE and found[0].isupper() and found.endswith(".") and 250 < len(found) <= 500
    lines = passage(CODE, 0.4, 300, code=True)
    assert lines in CODE and lines.startswith("def step_") and CODE[CODE.index(lines) + len(lines)] == "\n"
    assert passage("Short.", 0.5, 500) == "Short."


@given(st.text(max_size=400), st.floats(0, 0.85), st.integers(1, 300), st.booleans())
def test_a_passage_is_a_piece_of_any_text(text: str, start: float, characters: int, code: bool) -> None:
    found = passage(text, start, characters, code=code)
    assert found in text and len(found) <= characters
    assert found or not text.strip() or len(text) > characters


def test_tasks_that_no_document_suits_are_left_out() -> None:
    prose = [d for d in documents() if d.kind == "prose"]
    assert {p.kind for p in document_prompts(prose, 40)} == set(TASKS) - {"code", "explain"}
    with pytest.raises(QuickmergeError, match=r"one of the kinds code, prose, technical, got \['verse'\]"):
        document_prompts([Source("a", "verse", PROSE)], 4)
    with pytest.raises(ValueError, match="count must be a whole number of at least 1, got 0"):
        document_prompts(prose, 0)


def test_prompts_are_read_from_lines(tmp_path: Path) -> None:
    plain, rich = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("What is the sea?\n\n  Count to ten. \n")
    assert read_prompts(plain) == [Prompt("What is the sea?"), Prompt("Count to ten.")]
    rich.write_text(json.dumps({"prompt": "two\nlines", "kind": "x"}) + "\n" + json.dumps({"prompt": "one"}) + "\n")
    assert read_prompts(rich) == [Prompt("two\nlines", "x"), Prompt("one")]


@pytest.mark.parametrize("line", ['{"kind": "x"}', "[1]", '{"prompt": ""}', '{"prompt": "a", "kind": 3}', "no json"])
def test_a_line_that_is_no_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(QuickmergeError, match=r"on line 2$"):
        read_prompts(path)
