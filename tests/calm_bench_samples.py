"""Tiny CALMs and language models of one vocabulary, untrained, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quickmerge.calm.autoencoder import CalmAutoencoder
from quickmerge.calm.config import CalmAutoencoderConfig
from quickmerge.calm.model import CalmForCausalLM
from quickmerge.calm.train import new_calm

WORDS = 24
SIZE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
BACKBONE = {
    "model_type": "llama",
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    **SIZE,
}


def words() -> PreTrainedTokenizerFast:
    """A word for each id below the pad's, the first of which ends a text."""
    known = {"</s>": 0} | {f"w{i}": i for i in range(1, WORDS)}
    made = Tokenizer(models.WordLevel(known, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


def texts(count: int = 3, length: int = 100) -> list[str]:
    """Documents of random words."""
    draw = torch.Generator().manual_seed(0)
    return [
        " ".join(f"w{i}" for i in torch.randint(1, WORDS, (length,), generator=draw).tolist()) for _ in range(count)
    ]


def tiny_calm(patch: int = 4, seed: int = 0, **settings: Any) -> CalmForCausalLM:
    """A CALM whose head was not trained, but moved away from zero, so that its draws differ."""
    torch.manual_seed(seed)
    shape = {"latent": 6, "width": 12, "inner": 16, "eos_token_id": 0}
    autoencoder = CalmAutoencoder(CalmAutoencoderConfig(vocab_size=WORDS + 1, patch=patch, **shape))
    model = new_calm(autoencoder, backbone=BACKBONE, seed=seed, **{"samples": 3, "targets": 5, **settings})
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return model.eval()


def tiny_discrete(seed: int = 0, **settings: Any) -> LlamaForCausalLM:
    """An ordinary language model over the same tokens."""
    torch.manual_seed(seed)
    given = {key: value for key, value in BACKBONE.items() if key != "model_type"}
    config = LlamaConfig(vocab_size=WORDS + 1, eos_token_id=0, pad_token_id=WORDS, **{**given, **settings})
    return LlamaForCausalLM(config).eval()


def save(model: Any, folder: Path) -> Path:
    """A folder with a model and its tokenizer."""
    model.save_pretrained(folder)
    words().save_pretrained(folder)
    return folder
