"""A model's answers to prompts made of texts: written once, gone on with after a kill, read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from quickmerge.errors import QuickmergeError
from quickmerge.models.identity import model_hash
from quickmerge.speculative.gumiho import self_answers
from quickmerge.speculative.gumiho.self_answers import ASKED, Answered, Asking, prompt_of, read_answers, write_answers

ASKING = Asking(passage=5, tokens=12, temperature=1.0, batch=4)
TEXTS = [" ".join(f"w{(7 * i + 3 * j) % 60}" for i in range(40)) for j in range(3)]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"</s>": 1, **{f"w{i}": i + 2 for i in range(60)}, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", eos_token="</s>")


def written(model: Any, tokenizer: Any, path: Path, count: int, asking: Asking = ASKING, **more: Any) -> list[Answered]:
    write_answers(model, tokenizer, TEXTS, path, count, asking, **more)
    return read_answers(path, model)


def test_answers_are_the_models_own(tiny_llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    """Greedily, each answer is what the model writes behind its prompt alone, up to the token that ends it."""
    asking = Asking(passage=5, tokens=12, temperature=0.0, batch=4)
    found = written(tiny_llama, tokenizer, tmp_path / "a.jsonl", 6, asking)
    assert len(found) == 8  # whole batches
    for one in found:
        alone = tiny_llama.generate(torch.tensor([one.prompt]), max_new_tokens=12, do_sample=False, pad_token_id=1)
        wanted = alone[0, 5:].tolist()
        assert list(one.answer) == wanted[: wanted.index(1) + 1 if 1 in wanted else 12]
    assert len({one.prompt for one in found}) == 8
    text = " ".join(TEXTS)
    assert all(tokenizer.decode(list(one.prompt)) in text for one in found)


def test_an_answer_ends_with_its_last_token(tiny_llama: LlamaForCausalLM, tokenizer: Any, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_llama.lm_head.weight[1] += 0.05  # now and then the model ends
    found = written(tiny_llama, tokenizer, tmp_path / "a.jsonl", 12, Asking(passage=5, tokens=40, temperature=1.0))
    lengths = {len(one.answer) for one in found}
    assert len(lengths) > 3
    for one in found:
        assert 1 not in one.answer[:-1]
        assert len(one.answer) == 40 or one.answer[-1] == 1


def test_a_killed_run_goes_on_to_the_same_answers(tiny_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    """Killed inside a line, between the lines of a batch, and in the first line; and more asked for later."""
    whole = written(tiny_llama, tokenizer, tmp_path / "whole.jsonl", 12)
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    for left in (b"".join(lines[:6]), b"".join(lines[:5]) + lines[5][:9], lines[0][:20], lines[0], b""):
        path = tmp_path / "killed.jsonl"
        path.write_bytes(left)
        assert written(tiny_llama, tokenizer, path, 12) == whole
        assert path.read_bytes() == b"".join(lines)
    seen: list[tuple[int, int]] = []
    path = tmp_path / "more.jsonl"
    written(tiny_llama, tokenizer, path, 4)
    assert written(tiny_llama, tokenizer, path, 11, progress=lambda *at: seen.append(at)) == whole
    assert seen == [(8, 11), (11, 11)]
    before = path.stat().st_mtime_ns
    assert written(tiny_llama, tokenizer, path, 8) == whole and path.stat().st_mtime_ns == before


TEMPLATE = "w7 {{ messages[0]['role'] }} {{ messages[0]['content'] }}{% if add_generation_prompt %} w9{% endif %}"


def test_prompts_in_a_chat_template(tokenizer: Any) -> None:
    """One question after the other stands before the passage, in the template, open for the answer."""
    assert prompt_of(tokenizer, "w1 w2", 3) == [3, 4]
    tokenizer.chat_template = TEMPLATE
    for number, asked in enumerate([*ASKED, ASKED[0]]):
        wanted = f"w7 user {asked} w1 w2 w9"
        assert prompt_of(tokenizer, "w1 w2", number) == tokenizer(wanted, add_special_tokens=False)["input_ids"]
    assert len({len(prompt_of(tokenizer, "w1 w2", number)) for number in range(len(ASKED))}) > 1


def test_held_out_texts_are_not_asked_about(tiny_llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    held = tokenizer(TEXTS[1])["input_ids"]
    asking = Asking(passage=36, tokens=2, batch=4)
    found = written(tiny_llama, tokenizer, tmp_path / "a.jsonl", 1, asking, held_out=[held])
    assert len(found) == 2 and not any(list(one.prompt) == held[:36] for one in found)


def test_what_does_not_fit_is_told(tiny_llama: Any, tokenizer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(QuickmergeError, match="the texts make 24 prompts of 5 tokens, 25 were asked for"):
        written(tiny_llama, tokenizer, path, 25)
    written(tiny_llama, tokenizer, path, 4)
    with pytest.raises(QuickmergeError, match=r"was written with temperature 1.0, this run has 0.5"):
        written(tiny_llama, tokenizer, path, 4, Asking(passage=5, tokens=12, temperature=0.5, batch=4))
    with pytest.raises(QuickmergeError, match="must hold at least 5 answers, got 4"):
        read_answers(path, tiny_llama, 5)
    good = path.read_text()
    with torch.no_grad():
        tiny_llama.lm_head.weight += 1
    with pytest.raises(QuickmergeError, match="holds the answers of a model with other weights"):
        read_answers(path, tiny_llama)
    monkeypatch.setattr(self_answers, "hash_like", lambda _, given: json.loads(good.splitlines()[0])["model"])
    for wrong, message in [
        ("", "must hold answers as quickmerge writes them"),
        ("hello\n", "must be lines of JSON objects, got 'hello'"),
        (good + '{"prompt": [1], "answer": [64]}\n', "answer 5 is not made of token ids"),
        (good + '{"prompt": [], "answer": [6]}\n', "answer 5 is not made of token ids"),
        (good + '{"prompt": [true], "answer": [6]}\n', "answer 5 is not made of token ids"),
    ]:
        path.write_text(wrong)
        with pytest.raises(QuickmergeError, match=message):
            read_answers(path, tiny_llama)
    with pytest.raises(QuickmergeError, match="can't be read: No such file"):
        read_answers(tmp_path / "none.jsonl", tiny_llama)
    assert model_hash(tiny_llama)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"passage": 0}, "passage must be a whole number of at least 1, got 0"),
        ({"temperature": -1}, "temperature must be a number of at least 0, got -1"),
        ({"batch": 1.5}, "batch must be a whole number of at least 1, got 1.5"),
    ],
)
def test_limits(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asking(**wrong)
