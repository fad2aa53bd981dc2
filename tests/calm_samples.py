"""Small CALMs with lively weights, and texts and tokenizers for them."""

from __future__ import annotations

from typing import Any

import torch

from quickmerge.calm.config import CalmConfig
from quickmerge.calm.model import CalmForCausalLM

EOS, PAD, VOCABULARY = 1, 20, 21

BACKBONES: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {
        "model_type": "qwen3", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip
HEADS: dict[str, dict[str, Any]] = {
    "energy": {"noise": 5},
    "flow": {"steps": 3},
    "diffusion": {"steps": 4},
}


def small_config(patch: int = 3, backbone: str = "llama", head: str = "energy", **settings: Any) -> CalmConfig:
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    coder = {"vocab_size": VOCABULARY, "patch": patch, "latent": 6, "width": 16, "eos_token_id": EOS}
    given = {"samples": 3, "targets": 4, "head_settings": HEADS[head], **settings}
    return CalmConfig(backbone={**BACKBONES[backbone], **special}, autoencoder=coder, head=head, **given)


def small_calm(patch: int = 3, backbone: str = "llama", head: str = "energy", seed: int = 0, **settings: Any) -> Any:
    """A CALM whose head has something to say: a new one's draws are all zero."""
    torch.manual_seed(seed)
    model = CalmForCausalLM(small_config(patch, backbone, head, **settings)).eval()
    with torch.no_grad():
        for weight in model.head.parameters():
            weight.normal_(std=0.5)
        model.autoencoder.decoder.into.weight.mul_(3)
    return model


def some_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Tokens of texts: neither padding nor an end."""
    return torch.randint(2, PAD, shape, generator=torch.Generator().manual_seed(seed))


def generators(rows: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + row) for row in range(rows)]


def words_tokenizer() -> Any:
    """A tokenizer of twenty words, the first of which is unknown and the second an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "</s>": 1, **{f"w{number}": number for number in range(2, PAD)}}
    made = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>")
