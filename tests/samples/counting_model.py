"""A model that has learned nothing and yet profits from a context: it predicts what it has seen, by count."""

from __future__ import annotations

import random
from typing import Any

import torch
from tokenizer_samples import byte_level
from transformers import LlamaConfig, LlamaForCausalLM

DEPTH = 4
WORDS = (
    *("cat", "dog", "mat", "sat", "ran", "after", "token", "reads", "pays", "year"),
    *("pieces", "number", "the", "and", "that", "every", "transformer", "cut", "sum", "for"),
)


def counting_model(sharp: float = 0.15) -> tuple[Any, Any]:
    """One-hot embeddings; the last block's attention looks at all tokens alike and adds up what they are."""
    tokenizer = byte_level()
    width = 64 * -(-len(tokenizer) // 64)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=8, num_hidden_layers=DEPTH,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, head_dim=64, max_position_embeddings=2048,
        tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), width))
        model.lm_head.weight.copy_(sharp * torch.eye(len(tokenizer), width))
        last = model.model.layers[-1].self_attn
        last.v_proj.weight.copy_(torch.eye(width))
        last.o_proj.weight.copy_(torch.eye(width))
        for block in model.model.layers:  # keys of different lengths, by which methods rank tokens
            block.self_attn.k_proj.weight.copy_(1e-3 * torch.randn(width, width))
    return model, tokenizer


def documents(count: int) -> list[str]:
    """Texts of more than 1,000 tokens, each of five words of its own, and a number now and then."""
    made = []
    for seed in range(count):
        rng = random.Random(seed)
        own = rng.sample(WORDS, 5)
        made.append(" ".join(rng.choice(own) if rng.random() < 0.9 else str(rng.randrange(10)) for _ in range(1200)))
    return made
