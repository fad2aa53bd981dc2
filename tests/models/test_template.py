import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import quickmerge
from quickmerge.errors import UnsupportedModelError
from quickmerge.models import chat as limits
from quickmerge.models.chat import apply_chat_template, question, try_folder

TURN = [{"role": "user", "content": "hi"}]
GOOD = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<answer>{% endif %}"
)
BAD = {
    "two loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "growing": "{% set n = namespace(s='ab') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s }}",
    "times": "{{ 'a' * 30000000000 }}",
    "width": "{{ '%30000000000d' % 1 }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "recursion": "{% macro f(n) %}{% for i in range(9) %}{{ f(n) if n else 1 }}{% endfor %}{% endmacro %}{{ f(1) }}",
    "syntax": "{% for %}",
    "raised": "{{ raise_exception('no system role') }}",
    "long text": "{% for i in range(60000) %}" + "x" * 100 + "{% endfor %}",
    "long itself": "x" * (limits.TEMPLATE_BYTES + 1),
}


@pytest.fixture
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


def test_a_template_is_rendered_as_transformers_does(tokenizer: Any) -> None:
    tokenizer.chat_template = GOOD
    for settings in ({"tokenize": False}, {"tokenize": False, "add_generation_prompt": True}, {},
                     {"return_tensors": "pt"}):  # fmt: skip
        ours, theirs = (
            apply_chat_template(tokenizer, TURN, **settings),
            tokenizer.apply_chat_template(TURN, **settings),
        )
        assert str(ours) == str(theirs)
    assert apply_chat_template(tokenizer, TURN, tokenize=False) == "<user>hi"
    long = [{"role": "user", "content": "x" * 5_000_000}]
    assert len(apply_chat_template(tokenizer, long, tokenize=False)) == 5_000_006


@pytest.mark.parametrize("kind", BAD)
def test_a_template_without_bounds_is_refused_soon(tokenizer: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    tokenizer.chat_template = BAD[kind]
    start = time.monotonic()
    with pytest.raises(UnsupportedModelError, match="the chat template"):
        apply_chat_template(tokenizer, TURN, tokenize=False)
    assert time.monotonic() - start < 30


def test_one_that_turns_bad_later_is_stopped_too_and_in_threads(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 1.0)
    tokenizer.chat_template = "{% if messages[0].content == 'bad' %}" + BAD["two loops"] + "{% endif %}ok"
    assert apply_chat_template(tokenizer, TURN, tokenize=False) == "ok"
    found: list[str] = []

    def ask(word: str) -> None:
        try:
            found.append(apply_chat_template(tokenizer, [{"role": "user", "content": word}], tokenize=False))
        except UnsupportedModelError as error:
            found.append(str(error))

    threads = [threading.Thread(target=ask, args=(word,)) for word in ("bad", "good", "bad", "good")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found)[:2] == ["ok", "ok"] or sorted(found)[2:] == ["ok", "ok"]
    assert sum("takes longer" in text for text in found) == 2


def test_nobody_renders_a_template_past_the_limits() -> None:
    for path in Path(quickmerge.__file__).parent.rglob("*.py"):
        if path.relative_to(Path(quickmerge.__file__).parent).as_posix() != "models/chat.py":
            assert ".apply_chat_template(" not in path.read_text(encoding="utf-8"), path


def tries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is rendered in a process of its own from now on."""
    made: list[str] = []
    monkeypatch.setattr(limits, "_tried", set())
    monkeypatch.setattr(limits, "_try_aside", lambda render: made.append(render()))
    return made


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_template_of_a_folder_is_tried_once(place: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((tiny_folder / "tokenizer_config.json").read_text())
    config["eos_token"] = {"__type": "AddedToken", "content": "</s>", "lstrip": False}
    if place == "tokenizer_config.json":
        config["chat_template"] = GOOD + "{{ eos_token }}"
    else:
        (tiny_folder / place).write_text(GOOD + "{{ eos_token }}")
    (tiny_folder / "tokenizer_config.json").write_text(json.dumps(config))
    made, turn = tries(monkeypatch), question("the sea", "what is it?")
    try_folder(tiny_folder, turn)
    assert made == ["<user>the sea\n\nwhat is it?<answer></s>"]
    _, owner = quickmerge.load(tiny_folder)
    assert apply_chat_template(owner, turn, tokenize=False, add_generation_prompt=True) == made[0]
    assert len(made) == 1
    owner.add_special_tokens({"bos_token": "<s>"})  # with which the template might do something else
    apply_chat_template(owner, turn, tokenize=False)
    assert len(made) == 2


@pytest.mark.parametrize("kind", ["none", "no text", "no UTF-8", "no JSON", "list"])
def test_other_faults_of_a_folder_are_left_to_who_reads_it(
    kind: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_folder / "tokenizer_config.json"
    if kind == "no UTF-8":
        (tiny_folder / "chat_template.jinja").write_bytes(b"\xff")
    elif kind != "none":
        config.write_text({"no text": '{"chat_template": 3}', "no JSON": "{", "list": '[{"chat_template": "a"}]'}[kind])
    made = tries(monkeypatch)
    try_folder(tiny_folder, TURN)
    assert made == []
