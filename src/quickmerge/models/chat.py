"""Chat templates within limits of time and memory: a template is a program, and may be a stranger's.

transformers renders it in a sandbox that reaches no files and no objects, but that bounds neither time nor memory: two
nested loops run for hours, and one line makes a text of many gigabytes. So a template is tried first in a process of
its own, a copy of this one, that is given a few seconds and little memory. After that it is rendered here, with a look
at the clock at every line.
"""

from __future__ import annotations

import hashlib
import json
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from quickmerge.errors import QuickmergeError, UnsupportedModelError, check_string, door
from quickmerge.models.folder import SMALL
from quickmerge.models.weights import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "DEFAULT",
    "MEMORY",
    "SECONDS",
    "TEMPLATE_BYTES",
    "Templates",
    "answer_ids",
    "apply_chat_template",
    "around_document",
    "as_templates",
    "document_chat",
    "end_of_turn",
    "prompt_ids",
    "question",
    "templates_by_name",
    "templates_in",
    "try_folder",
    "with_images",
]


SECONDS = 3.0
"""Rendering a conversation takes a few milliseconds."""
MEMORY = 1 << 29
"""Bytes beyond what the process has."""
TEMPLATE_BYTES = 1 << 20
TEXT_CHARS = 1 << 22
"""What a template may add to the words of the conversation."""
NO_TEXT = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length", "processor_kwargs",
           "tokenizer_kwargs", "return_assistant_tokens_mask")  # fmt: skip
"""Settings that only matter once a text is rendered."""

_tried: set[str] = set()


def apply_chat_template(owner: Any, conversation: Sequence[Any], **settings: Any) -> Any:
    """What ``owner.apply_chat_template`` gives, or one sentence where its template doesn't end or grows without bound.

    Args:
        owner: a tokenizer or a processor of transformers, with a chat template.
        conversation: messages, as it takes them.
        **settings: as it takes them, such as ``tokenize`` and ``add_generation_prompt``.

    Raises:
        UnsupportedModelError: the template is too long, fails, takes too long, or makes far more text than it is given.
    """
    render = _tried_aside(owner, conversation, settings)
    with door("the chat template can't be used", UnsupportedModelError), _watched():
        text = render()
    if len(text) > TEXT_CHARS + 4 * _characters(conversation):
        raise UnsupportedModelError(f"the chat template makes {len(text):,} characters of a short conversation")
    if not settings.get("tokenize", True):
        return text
    with door("the chat template can't be used", UnsupportedModelError):
        return owner.apply_chat_template(conversation, **settings)


def question(document: str, prompt: str) -> list[dict[str, str]]:
    """The conversation that asks something about a document: one message, of the two that are there."""
    return [{"role": "user", "content": f"{document}\n\n{prompt}" if document else prompt}]


def try_folder(folder: Path, conversation: Sequence[Any]) -> None:
    """Try the chat template of a model's folder long before its tokenizer is read, without torch and without weights.

    What is wrong with the folder in other ways is left to whoever reads it. A template that passed with these special
    tokens is not tried again when the tokenizer is there.

    Args:
        folder: of the model, with files that `check_model_folder` let pass.
        conversation: as for `apply_chat_template`.

    Raises:
        UnsupportedModelError: the template is too long, takes too long or too much memory.
    """
    settings: dict[str, Any] = {}
    with suppress(QuickmergeError):
        settings = read_json(folder / "tokenizer_config.json", SMALL["tokenizer_config.json"])
    template = settings.get("chat_template")
    with suppress(OSError, UnicodeDecodeError):
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not isinstance(template, str):
        return
    from transformers import PreTrainedTokenizerBase

    tokens = {name: token.get("content") if isinstance(token, dict) else token for name, token in settings.items()
              if name in PreTrainedTokenizerBase.SPECIAL_TOKENS_ATTRIBUTES}  # fmt: skip
    tokens = {name: token for name, token in tokens.items() if isinstance(token, str)}
    if "eos_token" in tokens:
        tokens.setdefault("pad_token", tokens["eos_token"])  # as whoever reads the tokenizer does
    bare = PreTrainedTokenizerBase(chat_template=template, **tokens)
    _tried_aside(bare, conversation, {"add_generation_prompt": True})


def _tried_aside(owner: Any, conversation: Sequence[Any], settings: dict[str, Any]) -> Callable[[], str]:
    """What renders a conversation to text, once that was tried in a process of its own; raises as its callers do."""
    template = settings.get("chat_template") or getattr(owner, "chat_template", None)
    parts: list[Any] = list(template.values()) if isinstance(template, dict) else [template]
    if not all(isinstance(part, str) for part in parts):
        raise UnsupportedModelError(f"the chat template must be text, got {type(template).__name__}")
    if sum(len(part) for part in parts) > TEMPLATE_BYTES:
        raise UnsupportedModelError(f"the chat template must have at most {TEMPLATE_BYTES:,} characters")
    bare = {name: value for name, value in settings.items() if name not in NO_TEXT}

    def render() -> str:
        return str(owner.apply_chat_template(conversation, tokenize=False, **bare))

    # what it is given besides the conversation: a template may be harmless until there is a certain special token
    given = (parts, getattr(owner, "special_tokens_map", None))
    mark = hashlib.sha256(repr(given).encode("utf-8", "backslashreplace")).hexdigest()
    if mark not in _tried:
        _try_aside(render)
        _tried.add(mark)
    return render


class _TooLong(BaseException):
    """No Exception, lest the code that is interrupted takes it for one of its own."""


@contextmanager
def _watched() -> Iterator[None]:
    """Stop whatever Python code runs in the block, in this thread, once its time is over."""
    before = sys.gettrace()
    if before is not None:  # a debugger's; the template has been tried
        yield
        return
    end = time.monotonic() + SECONDS

    def look(frame: Any, event: str, arg: Any) -> Any:
        if time.monotonic() > end:
            raise _TooLong
        return look

    sys.settrace(look)
    try:
        yield
    except _TooLong:
        raise _too_long() from None
    finally:
        sys.settrace(None)


def _too_long() -> QuickmergeError:
    return UnsupportedModelError(f"the chat template must be rendered within {SECONDS:g} seconds, but takes longer")


def _try_aside(render: Callable[[], str]) -> None:
    """Render in a copy of this process, which is ended when its time or its memory is used up."""
    if not hasattr(os, "fork") or sys.platform != "linux":
        return  # elsewhere a copy of a process with threads is no safe thing
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of copies of a process with threads. This one renders a text and takes no lock that they hold.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _render_and_exit(render)
    os.close(writer)
    try:
        ended = bool(select.select([reader], [], [], SECONDS)[0])  # it is closed when the child ends
    finally:
        os.close(reader)
        try:
            os.kill(child, signal.SIGKILL)
        finally:
            status = os.waitpid(child, 0)[1]
    if not ended:
        raise _too_long()
    if status == TOO_LARGE << 8:
        raise UnsupportedModelError(
            f"the chat template must be rendered within {MEMORY >> 20} MiB of memory, but takes more"
        )


TOO_LARGE = 3


def _render_and_exit(render: Callable[[], str]) -> None:
    """In the copy: nothing of what the process has open or registered may be touched."""
    code = 0
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + MEMORY
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (most if hard < 0 else min(most, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        render()
    except MemoryError:
        code = TOO_LARGE
    except BaseException:
        code = 0  # it ends; what it raises, it raises again where it is told
    finally:
        os._exit(code)


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


# Chat templates that take images, and a question as a template puts it.


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


def document_chat(tokenizer: Any, document: str, prompt: str) -> tuple[str, slice]:
    """The text the model reads, and where in it the document stands.

    Document and prompt go into one user message where the tokenizer has a chat template, else one after the other.
    """
    for name, given in (("document", document), ("prompt", prompt)):
        check_string(name, given)
    message = question(document, prompt)
    text = message[0]["content"]
    if getattr(tokenizer, "chat_template", None):
        text = apply_chat_template(tokenizer, message, tokenize=False, add_generation_prompt=True)
    # A template may strip white space at the ends; what is between stays as it is.
    body = document.strip()
    start = text.find(body) if body else len(text)
    if start < 0:
        raise QuickmergeError("the chat template changes the document's text, so its tokens can't be told apart")
    return text, slice(start, start + len(body))


def around_document(tokenizer: Any, prompt: str, *, first: bool = False) -> tuple[str, str]:
    """The texts before and behind a document in a conversation that asks ``prompt`` about it.

    They are those of `document_chat`, whatever the document is, so that it can be read before anybody asks: what stands
    before it is the same for all prompts.

    Args:
        tokenizer: with a chat template or without.
        prompt: what is asked.
        first: the prompt stands before the document.

    Raises:
        QuickmergeError: the chat template changes what it is given, or writes it twice.
    """
    check_string("prompt", prompt)
    message = question(prompt, MARK) if first else question(MARK, prompt)
    text = message[0]["content"]
    if getattr(tokenizer, "chat_template", None):
        text = apply_chat_template(tokenizer, message, tokenize=False, add_generation_prompt=True)
    if text.count(MARK) != 1:
        raise QuickmergeError("the chat template changes the document's text, so its tokens can't be told apart")
    before, _, behind = text.partition(MARK)
    return before, behind


# Where templates are kept. transformers has one in ``chat_template.jinja`` and further ones in
# ``additional_chat_templates/``; older folders have them in ``tokenizer_config.json``, as a text, as a dict by name or
# as a list of names and texts; processors once kept theirs in ``chat_template.json``.


Templates: TypeAlias = str | dict[str, str]
"""One template, or several by name, ``default`` among them or not."""

DEFAULT = "default"
FILE, FOLDER, LEGACY = "chat_template.jinja", "additional_chat_templates", "chat_template.json"


def as_templates(value: Any, what: str) -> Templates | None:
    """A template in any of the forms in which they are kept; ``what`` it is called in messages.

    Raises:
        QuickmergeError: it is in none of them.
    """
    if value is None or value == {} or value == []:
        return None
    if isinstance(value, str):
        check_string(what, value)
        return value
    if isinstance(value, (list, tuple)) and all(
        isinstance(one, Mapping) and {"name", "template"} <= set(one) for one in value
    ):
        value = {one["name"]: one["template"] for one in value}
    if not isinstance(value, Mapping) or not all(isinstance(x, str) for pair in value.items() for x in pair):
        raise QuickmergeError(f"{what} must be a text, or texts by name, got a {type(value).__name__}")
    for name, text in value.items():
        check_string(f"{what} {name}", text)
    return dict(value)


def templates_by_name(templates: Templates | None) -> dict[str, str]:
    """Templates by their names, the only one as ``default``."""
    if templates is None:
        return {}
    return {DEFAULT: templates} if isinstance(templates, str) else templates


def templates_in(folder: Path) -> Templates | None:
    """What lies in a folder beside the files of a tokenizer, for one that doesn't say so itself.

    Raises:
        QuickmergeError: a file can't be read as a template.
    """
    found: dict[str, str] = {}
    try:
        if (folder / FILE).is_file():
            found[DEFAULT] = (folder / FILE).read_text(encoding="utf-8")
        elif (folder / LEGACY).is_file():
            held = json.loads((folder / LEGACY).read_text(encoding="utf-8"))
            found |= templates_by_name(as_templates(held["chat_template"], str(folder / LEGACY)))
        for path in sorted((folder / FOLDER).glob("*.jinja")):
            if path.is_file():
                found[path.stem] = path.read_text(encoding="utf-8")
    except OSError as error:
        raise QuickmergeError(f"the chat templates in {folder} can't be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, QuickmergeError):
            raise
        raise QuickmergeError(f"the chat templates in {folder} must be UTF-8 text, got something else") from error
    return found[DEFAULT] if list(found) == [DEFAULT] else found or None
