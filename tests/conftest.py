"""What the tests share: the real embedded model, and a tiny random one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


def pytest_configure(config: pytest.Config) -> None:
    # Workers that each start a thread per core only stand in each other's way.
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if workers > 1:
        import torch

        torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """SmolLM2-135M-Instruct and its tokenizer; skips where its weights are neither cached nor to be had."""
    from quickmerge.errors import FetchError
    from quickmerge.models import load

    try:
        return load("smollm2-135m", progress=False)
    except FetchError as error:
        pytest.skip(f"the weights of smollm2-135m cannot be fetched: {error}")


@pytest.fixture
def tiny_llama() -> LlamaForCausalLM:
    """A Llama of two layers with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def tiny_folder(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A folder that holds the tiny Llama and a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "sea": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path / "tiny"
    tiny_llama.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder
