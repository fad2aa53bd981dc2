"""Chat templates in every form in which they are kept, through a transplant and back."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizer_samples import byte_level, sentencepiece_bpe
from transformers import AutoTokenizer
from transplant_samples import model_folder

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.models.chat import as_templates, templates_in
from quickmerge.transplant import load_tokenizer, transplant
from quickmerge.transplant.settings import choose_template

PLAIN = "BASE {% for m in messages %}{{ m.content }}{% endfor %}"
MARKED = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
NAMED = {"default": PLAIN, "tool_use": "TOOL {{ messages }}", "rag": "RAG {{ messages }}"}
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def base_folder(folder: Path, template: Any, kept: str = "files") -> Path:
    """A model folder whose tokenizer has ``template``, kept in one of the ways."""
    tokenizer = copy.deepcopy(byte_level(420, MARKS))
    tokenizer.chat_template = None
    base = model_folder(folder, tokenizer=tokenizer)
    if kept == "files":
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
    elif kept == "chat_template.json":
        (base / kept).write_text(json.dumps({"chat_template": template}))
    else:
        path = base / "tokenizer_config.json"
        named = [{"name": name, "template": text} for name, text in template.items()] if kept == "list" else template
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": named}))
    return base


def donor_folder(folder: Path, template: Any = "DONOR {{ messages }}") -> Path:
    tokenizer = copy.deepcopy(sentencepiece_bpe(520))
    tokenizer.chat_template = template
    return model_folder(folder, tokenizer=tokenizer, seed=1)


@pytest.mark.parametrize(
    ("template", "kept"),
    [
        (PLAIN, "files"), (NAMED, "files"), ({"tool_use": "TOOL"}, "files"), (NAMED, "list"), (NAMED, "dict"),
        (PLAIN, "text"), (PLAIN, "chat_template.json"), (NAMED, "chat_template.json"), (None, "files"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("bare", [False, True])
def test_a_model_comes_home_with_the_templates_that_it_had(
    template: Any, kept: str, bare: bool, tmp_path: Path
) -> None:
    base = base_folder(tmp_path / "base", template, kept)
    before = load_tokenizer(base).chat_template
    assert before == template
    forth = transplant(base, donor_folder(tmp_path / "donor"), None, tmp_path / "forth", method="mean")
    assert forth.template[0] == ("tokenizer" if template is None else "base")
    there = AutoTokenizer.from_pretrained(tmp_path / "forth").chat_template
    assert there == ("DONOR {{ messages }}" if template is None else template)
    # also where the tokenizer alone is given, with no template beside it
    home = base / "tokenizer.json" if bare else base
    transplant(tmp_path / "forth", None, home, tmp_path / "back")
    assert AutoTokenizer.from_pretrained(tmp_path / "back").chat_template == before


def test_of_named_templates_the_default_one_decides(tmp_path: Path) -> None:
    theirs = sentencepiece_bpe(520)
    ours = copy.deepcopy(byte_level(420, MARKS))
    ours.chat_template = {"default": PLAIN, "tool_use": MARKED}
    chosen = choose_template(ours, theirs)
    assert (chosen.text, chosen.source) == ({"default": PLAIN}, "base") and "tool_use" in chosen.why
    ours.chat_template = {"default": MARKED, "tool_use": PLAIN}
    chosen = choose_template(ours, theirs)
    assert (chosen.text, chosen.source) == (None, "none") and "<|im_start|>" in chosen.why
    named = copy.deepcopy(theirs)
    named.chat_template = {"default": "x", "other": "y"}
    assert choose_template(ours, named).text == {"default": "x", "other": "y"}
    ours.chat_template = {"one": MARKED, "two": PLAIN}
    assert choose_template(ours, theirs).text == {"two": PLAIN}


@pytest.mark.parametrize("value", [5, ["a"], [{"name": "a"}], {"a": 5}, {5: "a"}, b"x", "a\ud800", {"a": "\ud800"}])
def test_what_is_no_template_is_told(value: Any) -> None:
    with pytest.raises(QuickmergeError, match=r"^chat_template\b.* must be "):
        as_templates(value, "chat_template")


def test_templates_beside_a_bare_tokenizer_are_found(tmp_path: Path) -> None:
    byte_level().backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.jinja").write_text(PLAIN)
    assert load_tokenizer(tmp_path).chat_template == templates_in(tmp_path) == PLAIN
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("TOOL")
    assert load_tokenizer(tmp_path).chat_template == {"default": PLAIN, "tool_use": "TOOL"}
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(QuickmergeError, match="must be UTF-8 text"):
        load_tokenizer(tmp_path)


EDITS: dict[str, Any] = {
    "rows of a text": lambda base: base.update(rows="many"),
    "rows beyond all bounds": lambda base: base.update(rows=10**12),
    "no rows": lambda base: base.update(rows=0),
    "fewer rows than ids": lambda base: base.update(rows=3),
    "settings of another file": lambda base: base["settings"].update({"../config.json": {}}),
    "settings that no transplant changes": lambda base: base["settings"]["config.json"].update(auto_map={"a": "b"}),
    "settings of a list": lambda base: base.update(settings=[]),
    "a template of a number": lambda base: base.update(chat_template=5),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_manifest_is_told(edit: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", None)
    transplant(base, donor_folder(tmp_path / "donor"), None, tmp_path / "forth", method="mean")
    path = tmp_path / "forth" / "transplant.json"
    data = json.loads(path.read_text())
    EDITS[edit](data["base"])
    path.write_text(json.dumps(data))
    with pytest.raises(DamagedWeightsError, match=r"is damaged \(.*\): copy the folder again$"):
        transplant(tmp_path / "forth", None, base, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("name", ["rows.safetensors", "dropped_rows.safetensors"])
def test_an_altered_side_file_is_told(name: str, tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", None)
    for method in ("mean", "zero"):
        transplant(
            base, donor_folder(tmp_path / f"d{method}"), None, tmp_path / method, method="mean", seed=len(method)
        )
    path = tmp_path / "mean" / "transplant" / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedWeightsError, match="it is another file than"):
        transplant(tmp_path / "mean", None, base, tmp_path / "back")


@pytest.mark.parametrize("given", [{"text": ["a \ud800"]}, {"choose_on": ["\udfff"]}, {"special": {"</s>": "\ud800"}}])
def test_texts_with_half_a_character_are_told(given: dict[str, Any], tmp_path: Path) -> None:
    name = next(iter(given))
    with pytest.raises(QuickmergeError, match=f"^{name} must be a text of whole characters, got half of one"):
        transplant(tmp_path, None, tmp_path, tmp_path / "out", **given)
