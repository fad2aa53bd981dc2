"""A document that is read once: answers are those of the whole prompt, and none depends on another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import held, past
from hosts_zoo import build
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_samples import byte_level

import quickmerge as qm
from quickmerge.merge.cache import KVzip, SnapKV
from quickmerge.models.chat import around_document, document_chat

TEMPLATE = (
    "{% for message in messages %}<user>{{ message['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
DOCUMENT = "The cat sat on the mat, and the dog ran after the cat. " * 6
QUESTIONS = ("Who sat?", "What did the dog do?", "Was there a mat?")
SHORT = qm.Prefix(min_tokens=0, recent=4)
MERGED = qm.Merge(qm.QuickMerge(keep=0.3, pool=3), 1, SHORT)
RECIPES: dict[str, Any] = {
    "merge": qm.Recipe(merge=MERGED),
    "twice": qm.Recipe(merge=qm.Merge(qm.ToMe(keep=0.4), [1, 3], SHORT)),
    "chunks": qm.Recipe(merge=qm.Merge(qm.QuickMerge(keep=0.4), 0, qm.BlockCausal(chunk=8, window=6))),
    "clusters": qm.Recipe(attention=qm.Multipole(budget=16, sink=2, interval=8, block=16)),
    "evicted": qm.Recipe(cache=SnapKV(keep=0.4, min_tokens=0)),
    "zipped": qm.Recipe(cache=KVzip(keep=0.4, min_tokens=0)),
    "read twice": qm.Recipe(merge=qm.Merge(qm.GemFilter(keep=0.4, block=1), mode=SHORT)),
    "drafts": qm.Recipe(decoding=qm.PromptLookup(ngram=2)),
    "all": qm.Recipe(
        merge=MERGED, attention=qm.Multipole(budget=16, sink=2, interval=8, block=16),
        decoding=qm.Speculation(qm.PromptLookup(ngram=2), tree=6),
    ),
    "plain": None,
}  # fmt: skip


def words(template: str | None = TEMPLATE) -> Any:
    tokenizer = byte_level(440, special=("<|endoftext|>", "<user>", "<end>", "<assistant>"))
    tokenizer.chat_template = template
    tokenizer.pad_token = "<|endoftext|>"
    return tokenizer


def tiny(family: str = "llama", **more: Any) -> Any:
    return build(family, dtype=torch.float64, vocab_size=440, eos_token_id=None, bos_token_id=None, **more)


def told(reading: Any, question: str, **more: Any) -> list[int]:
    ids: list[int] = reading.ask(question, max_new_tokens=8, **more).ids.tolist()
    return ids


@pytest.fixture(scope="module")
def answers() -> dict[str, tuple[Any, list[list[int]]]]:
    """Of every recipe a model, and what a reading of its own answers to each question."""
    model = tiny()
    found = {}
    for name, recipe in RECIPES.items():
        alone = [told(qm.read(model, words(), DOCUMENT, recipe), question) for question in QUESTIONS]
        found[name] = (qm.read(model, words(), DOCUMENT, recipe), alone)
    return found


@pytest.mark.parametrize("name", RECIPES)
@settings(max_examples=4, deadline=None)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_an_answer_depends_on_no_other_question(answers: Any, name: str, order: list[int]) -> None:
    reading, alone = answers[name]
    for i in order:
        assert told(reading, QUESTIONS[i]) == alone[i]


def test_a_sampled_answer_depends_on_its_seed_alone(answers: Any) -> None:
    reading, _ = answers["merge"]
    first = told(reading, QUESTIONS[0], sample=True, seed=3)
    told(reading, QUESTIONS[1], sample=True, seed=4)
    assert told(reading, QUESTIONS[0], sample=True, seed=3) == first != told(reading, QUESTIONS[0], sample=True, seed=5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize(
    "recipe", [None, qm.Recipe(merge=qm.QuickMerge(keep=1.0)), RECIPES["drafts"]], ids=["plain", "whole", "drafts"]
)
def test_where_nothing_is_reduced_the_answer_is_that_of_the_whole_prompt(family: str, recipe: Any) -> None:
    model, tokenizer = tiny(family), words()
    reading = qm.read(model, tokenizer, DOCUMENT, recipe)
    for question in QUESTIONS[:2]:
        before, behind = around_document(tokenizer, question)
        pieces = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, DOCUMENT.strip(), behind)]
        ids = torch.tensor([[*pieces[0], *pieces[1], *pieces[2]]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert told(reading, question) == out[0, ids.shape[1] :].tolist()


def test_a_merged_reading_goes_on_as_a_second_turn_of_the_same_run() -> None:
    model, tokenizer = tiny(), words()
    reading = qm.read(model, tokenizer, DOCUMENT, RECIPES["merge"])
    head = len(tokenizer("<user>", add_special_tokens=False)["input_ids"])
    _, behind = around_document(tokenizer, QUESTIONS[0])
    tail = tokenizer(behind, add_special_tokens=False)["input_ids"]
    run = qm.reduce(
        model, MERGED.reducer, 1, min_tokens=0, recent=4, protect=lambda ids: torch.arange(ids.shape[1])[None] < head
    )
    with torch.no_grad(), run:
        out = model(reading.ids, use_cache=True)
        found = []
        for token in tail:
            out = model(torch.tensor([[token]]), **past(held(out)))
        for _ in range(8):
            found.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([found[-1:]]), **past(held(out)))
    assert told(reading, QUESTIONS[0]) == found


def test_the_document_alone_is_merged() -> None:
    reading = qm.read(tiny(), words(), DOCUMENT, RECIPES["merge"])
    tokens = reading.ids.shape[1]
    assert reading.stats["merge"].tokens_in == tokens
    kept = reading.stats["merge"].tokens_per_layer
    assert kept[0] == tokens and kept[1] == pytest.approx(0.3 * (tokens - 1) + 1, abs=1)
    full = qm.read(tiny(), words(), DOCUMENT, None)
    assert reading.cache_bytes < 0.6 * full.cache_bytes and reading.seconds > 0
    assert repr(reading).startswith(f"Reading({tokens} tokens, quickmerge")
    assert full.ask("Why?", max_new_tokens=2).as_dict()["tokens"] == 2


def test_one_method_alone_will_do_and_kvzip_is_the_usual_one() -> None:
    model = tiny()
    usual = qm.read(model, words(), DOCUMENT)
    assert usual.recipe == qm.Recipe(cache=qm.KVzip(keep=0.4))
    assert qm.read(model, words(), DOCUMENT, qm.SnapKV(0.3)).recipe == qm.Recipe(cache=qm.SnapKV(0.3))
    assert qm.read(model, words(), DOCUMENT, qm.Random(keep=0.5)).recipe == qm.Recipe(merge=qm.Random(keep=0.5))


def test_between_questions_the_model_is_as_it_was(untouched: Any) -> None:
    model = untouched(tiny())
    reading = qm.read(model, words(), DOCUMENT, RECIPES["all"])
    reading.ask("Who?", max_new_tokens=2)


@pytest.mark.parametrize("template", [TEMPLATE, None])
def test_what_is_read_is_what_a_prompt_about_a_document_is(template: str | None) -> None:
    tokenizer = words(template)
    before, behind = around_document(tokenizer, "Who?")
    text, where = document_chat(tokenizer, "A cat.", "Who?")
    assert before + "A cat." + behind == text and len(before) == where.start
    before, behind = around_document(tokenizer, "Who?", first=True)
    assert before.endswith("Who?\n\n") and "Who?" not in behind


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[0]['content'] | upper }}{{ messages[0]['content'] }}", "the chat template changes the document"),
        ("{{ messages[0]['content'] | length }}<user>{{ messages[0]['content'] }}", "writes something else before"),
    ],
)
def test_a_template_that_can_t_be_split_is_told(template: str, message: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=message):
        qm.read(tiny(), words(template), DOCUMENT, None).ask("Who is it, please?")


@pytest.mark.parametrize(
    ("document", "recipe", "message"),
    [
        (" \n", None, "document must hold some text, got an empty one"),
        (5, None, "document must be a text, got a int"),
        (DOCUMENT, 0.4, "recipe must be a Recipe, a reducer, a Merge, a method for the cache or None, got 0.4"),
        (DOCUMENT * 50, None, "the document and --max-new-tokens must fit the model's 512 positions"),
    ],
)
def test_what_can_t_be_read_is_told(document: Any, recipe: Any, message: str) -> None:
    with pytest.raises(qm.QuickmergeError, match=message):
        qm.read(tiny(), words(), document, recipe)


def test_what_can_t_be_asked_is_told() -> None:
    reading = qm.read(tiny(), words(), DOCUMENT)
    with pytest.raises(qm.QuickmergeError, match="prompt must hold some text"):
        reading.ask(" ")
    with pytest.raises(qm.QuickmergeError, match="must fit the model's 512 positions"):
        reading.ask("Who?", max_new_tokens=500)
