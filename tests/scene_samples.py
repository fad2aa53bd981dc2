"""Images of two colours with labels, and two tiny models of which a recogniser of them is made."""

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

from quickmerge.recognition import Recognizer

COLOURS = {"red circle": (220, 30, 30), "green square": (30, 200, 40), "blue star": (20, 40, 220)}
WORDS = [
    "<unk>",
    "</s>",
    "The",
    "objects",
    "in",
    "the",
    "image",
    "are",
    ",",
    "red",
    "green",
    "blue",
    "circle",
    "square",
    "star",
    "cat",
    "car",
    "traffic",
    "lights",
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_models(seed: int = 0) -> tuple[Any, Any, Any]:
    """A vision transformer, a language model and its tokenizer of words."""
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    torch.manual_seed(seed)
    vision = hf.ViTModel(hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE), add_pooling_layer=False)
    language = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(WORDS), bos_token_id=None, eos_token_id=1, **SIZES))
    return vision, language, tokenizer


def small_recognizer(seed: int = 0, **settings: Any) -> Recognizer:
    """An untrained recogniser of both."""
    vision, language, tokenizer = tiny_models(seed)
    return Recognizer.new(vision, language, tokenizer, blocks=2, image_size=32, **settings)


def save_models(folder: Path) -> tuple[Path, Path]:
    """Both models as folders, each with its processor or tokenizer."""
    vision, language, tokenizer = tiny_models()
    vision.save_pretrained(folder / "vision")
    hf.ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "vision")
    language.save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    return folder / "vision", folder / "language"


def write_scenes(folder: Path) -> Path:
    """Nine images of the left and the right half in one colour each, annotated with both."""
    folder.mkdir(parents=True, exist_ok=True)
    names, lines = list(COLOURS), []
    for number in range(9):
        left, right = names[number % 3], names[number // 3]
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16], pixels[:, 16:] = COLOURS[left], COLOURS[right]
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "labels": list(dict.fromkeys((left, right)))}))
    (folder / "annotations.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
