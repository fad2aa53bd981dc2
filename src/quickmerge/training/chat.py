"""Chat templates that take images, and a question as a template puts it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from quickmerge.errors import QuickmergeError
from quickmerge.models.template import apply_chat_template

__all__ = ["answer_ids", "end_of_turn", "prompt_ids", "with_images"]

PLAIN = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""For language models that were never taught to chat."""

FLATTEN = """\
{%- set flat = namespace(messages=[]) -%}
{%- for message in messages -%}
{%- set text = namespace(value='') -%}
{%- if message['content'] is string -%}
{%- set text.value = message['content'] -%}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}
{%- set text.value = text.value + 'IMAGE' -%}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{%- set text.value = text.value + ('\\n' if text.value else '') + part['text'] -%}
{%- endfor -%}
{%- endif -%}
{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}
{%- endfor -%}
{%- set messages = flat.messages -%}
"""
"""What makes plain text of messages that hold parts: the images first, then the texts, each on a line."""

MARK = "\ue000"  # a character that no text holds


def with_images(template: str | None, image: str) -> str:
    """A language model's chat template made to take messages of images and texts as LLaVA's do.

    Args:
        template: the language model's own; None gives a plain one.
        image: the token that stands for an image.
    """
    return FLATTEN.replace("IMAGE", image) + (PLAIN if template is None else template)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str, image_tokens: int) -> list[int]:
    """A question about one image as the chat template puts it, up to where the answer begins.

    Args:
        tokenizer: of a model that `new_vlm` made, or of another whose chat template writes one token for an image.
        question: one that holds no token of the tokenizer's own.
        image_tokens: how many tokens stand for the image; 0 for none.
    """
    image = _image_token(tokenizer)
    if image in question:
        raise QuickmergeError(f"question must not hold {image}, which stands for an image, got {question!r}")
    parts: list[dict[str, str]] = [{"type": "text", "text": question}]
    if image_tokens:
        parts = [{"type": "image"}, *parts]
    text = _render(tokenizer, [{"role": "user", "content": parts}], True)
    return _ids(tokenizer, text.replace(image, image * image_tokens, 1) if image_tokens else text)


def answer_ids(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """An answer and the token that ends the assistant's turn."""
    return [*_ids(tokenizer, answer), end_of_turn(tokenizer)]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends the assistant's turn: the template's, or else the one that ends a text.

    Raises:
        QuickmergeError: if the tokenizer has no chat template, or no token that could be meant.
    """
    # what the template writes after the answer begins with the end of the turn
    said = {"user": "?", "assistant": MARK}
    turns = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in said.items()]
    following = _ids(tokenizer, _render(tokenizer, turns, False).partition(MARK)[2])
    end = following[0] if following and following[0] in _specials(tokenizer) else tokenizer.eos_token_id
    if end is None:
        raise QuickmergeError("tokenizer must have a token that ends a turn, got one without eos_token")
    return int(end)


def _render(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, Any]], asks: bool) -> str:
    if tokenizer.chat_template is None:
        raise QuickmergeError("tokenizer must have a chat template, got one without")
    return str(apply_chat_template(tokenizer, turns, tokenize=False, add_generation_prompt=asks))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(each) for each in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _specials(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder} - {tokenizer.unk_token_id}


def _image_token(tokenizer: PreTrainedTokenizerBase) -> str:
    return str(getattr(tokenizer, "image_token", None) or "<image>")
