"""Tiny models with tokenizers, on disk, that the tests of transplantation share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors import safe_open
from tokenizer_samples import byte_level, sentencepiece_bpe

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SIZE, "num_key_value_heads": 2, "tie_word_embeddings": False}),
    "llama tied": ("Llama", {**SIZE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {**SIZE, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT),
    "neox": ("GPTNeoX", SIZE),
    "phi": ("Phi", SIZE),  # its output layer has a bias
    "gemma3": ("Gemma3Text", {**SIZE, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": True}),
}
BASE = byte_level(420, ("<|endoftext|>",))


def model_folder(
    folder: Path, family: str = "llama", *, tokenizer: Any = None, rows: int | None = None, seed: int = 0,
    dtype: torch.dtype = torch.float32, shard: str | None = None,
) -> Path:  # fmt: skip
    """A random model of a family in a folder, with the tokenizer."""
    tokenizer = tokenizer or BASE
    name, settings = FAMILIES[family]
    eos = tokenizer.eos_token_id
    config = getattr(hf, f"{name}Config")(
        vocab_size=rows or len(tokenizer), bos_token_id=eos, eos_token_id=eos, pad_token_id=None, **settings
    )
    torch.manual_seed(seed)
    model = hf.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)  # no row of zeros, no bias of zeros
    model.save_pretrained(folder, **({} if shard is None else {"max_shard_size": shard}))
    tokenizer.save_pretrained(folder)
    return folder


def tokenizer_folder(folder: Path, tokenizer: Any = None) -> Path:
    """A folder that holds a tokenizer and nothing else."""
    (tokenizer or sentencepiece_bpe(520)).save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Everything that the weights of a folder hold."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same down to the last bit."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def config_of(folder: Path, name: str = "config.json") -> dict[str, Any]:
    data: dict[str, Any] = json.loads((folder / name).read_text())
    return data
