"""Tiny models, texts and images for the commands that are killed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np


def prepare(folder: Path) -> None:
    """Write them all into a folder."""
    import torch
    import transformers as hf
    import vision_samples
    import vlm_samples
    from PIL import Image
    from scene_samples import save_models, write_scenes
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transplant_samples import model_folder, tokenizer_folder

    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "the": 2, "sea": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = hf.LlamaConfig(vocab_size=64, bos_token_id=0, eos_token_id=1, max_position_embeddings=128, **sizes)
    hf.LlamaForCausalLM(shape).save_pretrained(folder / "words")
    hf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(
        folder / "words"
    )
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=40, **sizes)).save_pretrained(folder / "language")
    vlm_samples.tokenizer().save_pretrained(folder / "language")
    vlm_samples.annotated(folder / "asked", 3)
    processor = hf.ViTImageProcessorPil(size={"height": 32, "width": 32})
    vit = hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE)
    hf.ViTModel(vit).save_pretrained(folder / "tiny")
    labels = {"id2label": {0: "left", 1: "right"}, "label2id": {"left": 0, "right": 1}}
    vit = hf.ViTConfig(**vision_samples.SIZE, **vision_samples.IMAGE, **labels)
    hf.ViTForImageClassification(vit).save_pretrained(folder / "classifier")
    for name in ("tiny", "classifier"):
        processor.save_pretrained(folder / name)
    draws = np.random.default_rng(0)
    for label in ("left", "right"):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(3):
            pixels = draws.integers(0, 200, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / label / f"{number}.png")
    save_models(folder / "models")
    write_scenes(folder / "scenes")
    model_folder(folder / "base")
    model_folder(folder / "base2", seed=3)
    tokenizer_folder(folder / "wanted")
    (folder / "texts").mkdir()
    for name in "ab":
        (folder / "texts" / f"{name}.txt").write_text("the sea the the sea " * 60 + name)
    (folder / "short.txt").write_text("the sea the the sea " * 10)
    prompts = [{"kind": "question", "prompt": "the sea the sea", "id": name} for name in ("one", "two")]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    _coder(folder)


def _coder(folder: Path) -> None:
    """A CALM's autoencoder, trained for a step by the command itself."""
    import os
    import sys

    from quickmerge.cli import main

    os.chdir(folder)
    coder = "train calm --stage autoencoder --data texts --vocabulary 262 --patch 2 --chunks 6 --latent 6 --ae-width 16"
    sys.argv = ["quickmerge", *f"{coder} --steps 1 --batch 2 --out coder".split()]
    main()
