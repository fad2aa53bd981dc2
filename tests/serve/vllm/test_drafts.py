"""Drafts by exported heads and by prompt lookup, and a transplanted model: vLLM writes what it writes without them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizer_samples import byte_level, sentencepiece_bpe
from transplant_samples import model_folder
from vllm_samples import TEXT, accepted, by_transformers, engine, save, tokenizer, written

import quickmerge as qm
from quickmerge.data import shipped_gumiho
from quickmerge.recipe import Recipe
from quickmerge.serve.vllm import LOOKUP
from quickmerge.speculative.gumiho import write_eagle
from quickmerge.transplant import transplant

pytestmark = pytest.mark.vllm

QUESTIONS = (
    "Name three rivers of Europe.", "Write a haiku about rain.", "What is 12 times 12?", "Who wrote Hamlet?",
    "Explain photosynthesis in two sentences.", "List the days of the week.",
)  # fmt: skip
SHORT = {"max_model_len": 512, "max_num_seqs": 8}


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Any]:
    model, words = qm.load("smollm2-135m")
    return save(tmp_path_factory.mktemp("smollm2"), model, words), model, words


def chats(words: Any, lead: str = "") -> list[dict[str, Any]]:
    turns = [[{"role": "user", "content": lead + each}] for each in QUESTIONS]
    ids = [words.apply_chat_template(each, add_generation_prompt=True, return_dict=True)["input_ids"] for each in turns]
    return [{"prompt_token_ids": each} for each in ids]


def test_exported_heads_and_lookup_change_nothing(
    smollm2: tuple[str, Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, model, words = smollm2
    shipped = shipped_gumiho("smollm2-135m")
    assert shipped is not None
    write_eagle(qm.Gumiho.from_pretrained(shipped), model, tmp_path / "eagle")
    lead = "Answer, and repeat the question word for word first, and again behind the answer. "
    asked = {"plain": chats(words), "quoting": chats(words, lead)}
    with engine(folder, **SHORT) as llm:
        wanted = {name: written(llm, each, 48) for name, each in asked.items()}
    told = []
    for k in (2, 4):
        drafts = {"method": "eagle", "model": str(tmp_path / "eagle"), "num_speculative_tokens": k}
        with engine(folder, speculative_config=drafts, **SHORT) as llm:
            assert written(llm, asked["plain"], 48) == wanted["plain"]
            mean, passes, taken = accepted(llm)
            assert taken > 0
            told.append(f"eagle, k = {k}: mean accepted length {mean:.2f} ({taken} drafts taken in {passes} passes)")
    drafts = {"method": "custom_class", "model": LOOKUP, "num_speculative_tokens": 4}
    with engine(folder, speculative_config=drafts, **SHORT) as llm:
        assert written(llm, asked["quoting"], 48) == wanted["quoting"]
        mean, passes, taken = accepted(llm)
        assert taken > 0
        told.append(f"lookup, k = 4: mean accepted length {mean:.2f} ({taken} drafts taken in {passes} passes)")
    with capsys.disabled():
        print("", *told, sep="\n")


def test_lookup_takes_the_recipe(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save(tmp_path, hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval(), tokenizer())
    prompts = [{"prompt_token_ids": [1, *range(20, 60), *range(20, 50)]}, {"prompt_token_ids": [1, 30, 31, 32]}]
    with engine(folder) as llm:
        wanted = written(llm, prompts, 40)
    recipe = Recipe(decoding=qm.PromptLookup(ngram=2)).as_dict()
    drafts = {"method": "custom_class", "model": LOOKUP, "num_speculative_tokens": 3}
    with engine(folder, speculative_config=drafts, hf_overrides={"quickmerge": recipe}) as llm:
        assert written(llm, prompts, 40) == wanted
        assert accepted(llm)[1] > 0


def test_a_transplanted_model_writes_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = byte_level(420, ("<|endoftext|>",))
    config = hf.LlamaConfig(**{**TEXT, "vocab_size": len(words), "pad_token_id": None})
    base = save(tmp_path / "base", hf.LlamaForCausalLM(config).eval(), words)
    donor = model_folder(tmp_path / "donor", tokenizer=sentencepiece_bpe(520))
    transplant(base, donor, None, tmp_path / "out", choose_by="held-out")
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert model.get_input_embeddings().weight.shape[0] != len(words)
    texts = ["The sea is wide.", "import numpy as np", "Zwei Wörter und 12 Zahlen"]
    with engine(str(tmp_path / "out")) as llm:
        got = written(llm, texts)
    reads = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = [{"input_ids": reads(text, return_tensors="pt")["input_ids"]} for text in texts]
    assert got == [by_transformers(model, each) for each in inputs]
