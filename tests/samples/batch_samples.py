"""A tiny model with a tokenizer that was trained on the shipped document, and prompts cut from it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import quickmerge

TEXT = (Path(quickmerge.__file__).parent / "data" / "demo.txt").read_text(encoding="utf-8")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def save_tiny(folder: Path, seed: int = 0) -> Path:
    """A Llama of four blocks with random weights, and a byte-level tokenizer of 600 tokens with a chat template."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    words.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=600, hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.3, bos_token_id=None, eos_token_id=1,
        pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def prompts(count: int, low: int = 5, high: int = 90) -> list[str]:
    """Pieces of the document, of ``low`` to ``high`` words; no two are the same."""
    words, draw = TEXT.split(), random.Random(0)
    found: list[str] = []
    for number in range(count):
        many = draw.randint(low, high)
        at = draw.randrange(len(words) - many)
        found.append(f"{number}: {' '.join(words[at : at + many])}")
    return found


def write_lines(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
