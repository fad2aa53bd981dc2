"""Tiny models as folders that vLLM loads, and what an engine and transformers write of the same prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

WORDS = [f"w{i}" for i in range(80)]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
           "<|video_pad|>", "<|im_start|>", "<|im_end|>"]  # fmt: skip
VOCABULARY = 128
STEPS = 12
"""Tokens that are written of each prompt."""


def tokenizer(**more: Any) -> Any:
    """One of whole words, with what marks images in the families at hand."""
    ids = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(each, normalized=False, special=True) for each in SPECIAL])
    made = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>", **more
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3, "tie_word_embeddings": False,
}  # fmt: skip


def pictures(count: int, sizes: list[tuple[int, int]], seed: int = 0) -> list[Image.Image]:
    """Images of smooth noise, (width, height) by turns from ``sizes``."""
    draws, found = np.random.default_rng(seed), []
    for index in range(count):
        coarse = draws.integers(0, 256, (7, 5, 3), dtype=np.uint8)
        found.append(Image.fromarray(coarse).resize(sizes[index % len(sizes)], Image.Resampling.BILINEAR))
    return found


def save(folder: Path, model: Any, *parts: Any) -> str:
    """All of it as a folder."""
    model.generation_config = hf.GenerationConfig(bos_token_id=1, pad_token_id=3)
    model.save_pretrained(folder)
    for part in parts:
        part.save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def engine(folder: str, **settings: Any) -> Iterator[Any]:
    """An engine in this process, taken down afterwards."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
             "enable_prefix_caching": False, "disable_log_stats": False, "seed": 0}  # fmt: skip
    llm = LLM(model=folder, **{**usual, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def written(llm: Any, prompts: list[Any], steps: int = STEPS) -> list[list[int]]:
    """The tokens that an engine writes greedily behind each prompt, all in one call."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0.0, max_tokens=steps, ignore_eos=True)
    return [list(each.outputs[0].token_ids) for each in llm.generate(prompts, greedy, use_tqdm=False)]


@torch.no_grad()
def by_transformers(model: Any, inputs: dict[str, Any], steps: int = STEPS) -> list[int]:
    """The tokens that a model of transformers writes greedily behind a prompt of one row."""
    known = {name: value for name, value in inputs.items() if value is not None}
    out = model.generate(**known, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    return [int(each) for each in out[0, -steps:]]


def accepted(llm: Any) -> tuple[float, int, int]:
    """Mean accepted length of an engine's drafts so far (the bonus token included), passes, and tokens accepted."""
    values = {each.name: getattr(each, "value", None) for each in llm.get_metrics() if "spec_decode" in each.name}
    drafts, taken = values["vllm:spec_decode_num_drafts"], values["vllm:spec_decode_num_accepted_tokens"]
    return 1 + taken / max(1, drafts), drafts, taken
