"""Tasks: the same sample for the same seed, answers that stand where they are said to, prompts in every format."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import byte_level

from quickmerge.datasets.task_prompts import FORMATS, MODES, lay_out
from quickmerge.datasets.tasks import ROOM, TASKS, TaskMaker
from quickmerge.errors import QuickmergeError

TEXTS = ("The river is wide here. " * 40, "Nobody came, and so the evening went on as it had begun. " * 30)
CODE = ("def add(a, b):\n    return a + b\n\n" * 40,)
TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def maker(tokens: int = 2400, **more: Any) -> TaskMaker:
    return TaskMaker(byte_level(), tokens, **{"texts": TEXTS, "code": CODE, **more})


def chatty() -> Any:
    tokenizer = byte_level(special=("<|endoftext|>", "<user>", "<end>"))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.mark.parametrize("task", TASKS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**16))
def test_every_answer_stands_in_the_document_behind_its_beginning(task: str, seed: int) -> None:
    sample = maker().make(task, seed)
    assert sample.task == task and sample.seed == seed and 1 <= len(sample.queries) <= 4
    text = byte_level().decode(list(sample.document))
    assert len(sample.document) <= 2400 - ROOM
    assert len(sample.document) > 2200
    for query in sample.queries:
        assert query.answer.startswith(" ") and query.answer in text.replace("\n", "\n ")
        assert query.question[0].islower() and query.question.endswith(("?", '"?'))
        if task not in ("majority", "labels"):
            found = text.index(query.answer) / len(text)
            assert abs(found - query.depth) < 0.25 or text.count(query.answer) > 1


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_sample_and_another_seed_another_one(task: str) -> None:
    first = maker().make(task, 5)
    assert maker().make(task, 5) == first != maker().make(task, 6)


def test_a_fact_is_whole_and_stands_at_its_depth() -> None:
    for seed, depth in enumerate((0.1, 0.3, 0.5, 0.7)):
        sample = maker(1000).make("needle", seed)
        (query,) = sample.queries
        assert query.depth == depth
        text = byte_level().decode(list(sample.document))
        assert f"\nNote: {query.lead}{query.answer}.\n" in text
        assert len(sample.document) == 1000 - ROOM


def test_the_last_report_is_the_answer() -> None:
    (query,) = maker().make("latest", 1).queries
    text = byte_level().decode(list(maker().make("latest", 1).document))
    assert text.rindex("Report: ") == text.index(f"Report: {query.lead}{query.answer}.")


def test_the_most_frequent_word_is_the_answer() -> None:
    for seed in range(4):
        sample = maker(600).make("majority", seed)
        text = byte_level().decode(list(sample.document))
        count = {word: text.count(f": {word}\n") for word in ("apple", "lemon", "orange", "grape", "peach")}
        assert max(count, key=count.__getitem__) == sample.queries[0].answer.strip()
        assert sorted(count.values())[-1] > sorted(count.values())[-2]


def test_words_that_are_asked_for_are_no_example() -> None:
    sample = maker().make("labels", 3)
    text = byte_level().decode(list(sample.document))
    for query in sample.queries:
        assert f"{query.lead} " not in "\n" + text.replace("\n", "\n ")
        assert f" is{query.answer}.\n" in text


@pytest.mark.parametrize("task", TASKS)
def test_too_few_tokens_are_refused_with_how_many_it_takes(task: str) -> None:
    with pytest.raises(QuickmergeError, match=r"^tokens must be at least \d+ for this sample of the task, got 70$"):
        maker(70).make(task, 0)


def test_as_many_tokens_as_it_asks_for_are_enough() -> None:
    with pytest.raises(QuickmergeError) as error:
        maker(70).make("pairs12", 0)
    needed = int(str(error.value).split()[5])
    assert len(maker(needed).make("pairs12", 0).document) == needed - ROOM
    with pytest.raises(QuickmergeError, match=f"at least {needed} "):
        maker(needed - 1).make("pairs12", 0)


def test_a_task_that_there_is_not_is_named() -> None:
    with pytest.raises(QuickmergeError, match=r"^task must be one of needle, .* got 'needel' \(did you mean 'needle'"):
        maker().make("needel", 0)


@pytest.mark.parametrize(("name", "value"), [("tokens", 0), ("queries", 0), ("tokens", 1.5)])
def test_settings_out_of_range_are_named(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be a whole number of at least 1, got {value}"):
        maker(**{name: value})


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(QuickmergeError, match=r"^texts must be texts with some tokens"):
        maker(texts=["", "a"])


def test_without_texts_what_ships_is_the_filler() -> None:
    sample = TaskMaker(byte_level(), 500).make("needle", 1)
    assert len(sample.document) == 500 - ROOM
    assert TaskMaker(byte_level(), 500).make("constant", 1) == TaskMaker(byte_level(), 500).make("constant", 1)


def test_a_fingerprint_tells_settings_apart() -> None:
    made = {
        maker().fingerprint,
        maker(1000).fingerprint,
        maker(texts=TEXTS[:1]).fingerprint,
        maker(queries=2).fingerprint,
    }
    assert len(made) == 4 and maker().fingerprint == maker().fingerprint


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_holds_document_question_and_answer_in_its_order(task: str, format: str, mode: str) -> None:
    tokenizer = chatty()
    sample = TaskMaker(tokenizer, 2400, texts=TEXTS, code=CODE).make(task, 2)
    for query in sample.queries:
        made = lay_out(tokenizer, sample, query, format, mode)
        before, behind, lead, answer = (tokenizer.decode(list(each)) for each in
                                        (made.before, made.behind, made.lead, made.answer))  # fmt: skip
        assert made.document == sample.document and answer == query.answer
        assert made.prompt == made.before + made.document + made.behind == made.shared + made.behind
        asked = query.question[1:]
        if mode == "first":
            assert asked in before and asked not in behind
        else:
            assert (asked in before) == (mode == "both") and (asked in behind or behind == query.begun)
        if format == "chat":
            assert before.startswith("<user>") and behind.endswith("<end>\n<assistant>")
            assert lead[1:] == query.lead[1:] and lead[0].isupper() == query.lead[0].isalpha()
        elif format == "bare":
            assert behind.endswith("\nAnswer:") and lead == f" {query.lead}"
        elif mode == "first":
            assert (behind + lead).endswith(query.hint or query.lead) and query.question not in behind
        else:
            assert behind == query.begun and lead == ""


def test_a_question_later_is_read_as_the_same_tokens() -> None:
    tokenizer = chatty()
    sample = TaskMaker(tokenizer, 1200, texts=TEXTS, code=CODE).make("needles4", 0)
    for format in FORMATS:
        made = [lay_out(tokenizer, sample, query, format, "later") for query in sample.queries]
        assert len({each.shared for each in made}) == 1
        assert made == [lay_out(tokenizer, sample, query, format, "last") for query in sample.queries]


def test_formats_and_modes_that_there_are_not_are_named() -> None:
    sample = maker().make("needle", 0)
    with pytest.raises(QuickmergeError, match=r"^format must be one of cue, bare, chat, got 'chatt'"):
        lay_out(byte_level(), sample, sample.queries[0], "chatt")
    with pytest.raises(QuickmergeError, match=r"^mode must be one of last, first, both, later, got 'later on'"):
        lay_out(byte_level(), sample, sample.queries[0], "cue", "later on")


def test_a_chat_needs_a_template() -> None:
    sample = maker().make("needle", 0)
    tokenizer = byte_level(421)
    with pytest.raises(QuickmergeError, match=r"^format must be cue or bare for a tokenizer without a chat template"):
        lay_out(tokenizer, sample, sample.queries[0], "chat")
