"""A small LLaVA with random weights, its processor, and images with questions for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
import vision_samples
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from quickmerge.merge.train.new_vlm import new_vlm

WORDS = (
    "what",
    "which",
    "colour",
    "shape",
    "is",
    "it",
    "the",
    "how",
    "many",
    "are",
    "there",
    "?",
    "red",
    "blue",
    "left",
)
SIDE, PATCH = 32, 8
TOKENS = (SIDE // PATCH) ** 2
"""Visual tokens of an image."""


def tokenizer() -> Any:
    """One of a few words that knows no chat template."""
    ids = {
        word: index
        for index, word in enumerate(("<unk>", "</s>", *WORDS, "user", "assistant", ":", "Describe", "image"))
    }
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


def tiny_vlm() -> tuple[Any, Any]:
    """Model and processor: 4 x 4 patches of an image of 32 x 32 pixels, in front of a Llama of two layers."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1}
    language = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=64, tie_word_embeddings=False, **sizes, **heads)).eval()
    config = hf.Dinov2Config(**vision_samples.SIZE, image_size=SIDE, patch_size=PATCH, mlp_ratio=2)
    processor = hf.BitImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
    )
    return new_vlm(hf.Dinov2Model(config).eval(), language, tokenizer(), processor, layers=(2, 3))


def save(folder: Path) -> Path:
    """The same as a folder."""
    for part in tiny_vlm():
        part.save_pretrained(folder)
    return folder


def annotated(folder: Path, count: int = 2) -> Path:
    """Images with two questions each, of two kinds, as `read_annotated` reads them."""
    folder.mkdir(parents=True)
    draws, lines = np.random.default_rng(0), []
    for number in range(count):
        Image.fromarray(draws.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        questions = [
            {"kind": "colour", "question": "what colour is it ?", "answer": "red"},
            {"kind": "where", "question": "which shape is it ?", "answer": "left"},
        ]
        lines.append(json.dumps({"image": f"{number}.png", "questions": questions}))
    (folder / "annotations.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
