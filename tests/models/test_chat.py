"""Chat templates that take images."""

from __future__ import annotations

import pytest
import vlm_samples
from hypothesis import given
from hypothesis import strategies as st

from quickmerge.errors import QuickmergeError
from quickmerge.models.chat import answer_ids, prompt_ids, with_images

CHAT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '[system]be good[end]' }}"
    "{% endif %}{{ '[' + message['role'] + ']' + message['content'] + '[end]' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def speaking(template: str | None = CHAT, end: str | None = None):
    """A tokenizer with a chat template, and with a token that ends a turn if ``end`` is given."""
    tokenizer = vlm_samples.tokenizer()
    named = ["<image>"] + ([end] if end else [])
    tokenizer.add_special_tokens({"extra_special_tokens": named})
    tokenizer.chat_template = with_images(template, "<image>")
    return tokenizer


def render(tokenizer, messages, asks: bool = True) -> str:
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)


@given(st.lists(st.sampled_from(["what is it ?", "", "  two\nlines ", "{{ not }} a template"]), min_size=1, max_size=4),
       st.booleans(), st.booleans())  # fmt: skip
def test_plain_text_is_put_as_before(texts: list[str], asks: bool, system: bool) -> None:
    roles = (["system"] if system else []) + ["user", "assistant"] * 3
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    plain = vlm_samples.tokenizer()
    plain.chat_template = CHAT
    assert render(speaking(), messages, asks) == render(plain, messages, asks)


def test_parts_are_images_first_and_then_the_texts_each_on_a_line() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "image"}, {"type": "text", "text": "two"}, {"type": "image"}]
    told = render(speaking(), [{"role": "user", "content": parts}])
    assert told == "[system]be good[end][user]<image><image>\none\ntwo[end]\n[assistant]"


def test_a_model_that_never_chatted_gets_a_plain_template() -> None:
    told = render(
        speaking(None), [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what ?"}]}]
    )
    assert told == "user: <image>\nwhat ?</s>\nassistant: "


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_a_prompt_has_a_token_for_every_part_of_the_image(tokens: int) -> None:
    tokenizer = speaking()
    image = tokenizer.convert_tokens_to_ids("<image>")
    ids = prompt_ids(tokenizer, "what is it ?", tokens)
    assert ids.count(image) == tokens
    text = "[system]be good[end][user]" + "<image>" * tokens + "\nwhat is it ?[end]\n[assistant]"
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_an_answer_ends_as_the_template_ends_a_turn() -> None:
    red = vlm_samples.tokenizer().convert_tokens_to_ids("red")
    plain = speaking()
    # "[end]" is no token of its own here, so that the text ends with the tokenizer's own end
    assert answer_ids(plain, "red") == [red, plain.eos_token_id]
    turns = speaking(end="[end]")
    assert answer_ids(turns, "red") == [red, turns.convert_tokens_to_ids("[end]")]


def test_bad_input_is_told() -> None:
    with pytest.raises(QuickmergeError, match="question must not hold <image>"):
        prompt_ids(speaking(), "what is <image> ?", 3)
    tokenizer = vlm_samples.tokenizer()
    with pytest.raises(QuickmergeError, match="must have a chat template"):
        answer_ids(tokenizer, "red")
    silent = speaking()
    silent.eos_token = None
    with pytest.raises(QuickmergeError, match="a token that ends a turn"):
        answer_ids(silent, "red")
