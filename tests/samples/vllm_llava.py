"""Tiny LLaVAs with CLIP and SigLIP towers as folders, prompts with images, and what transformers write of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from vllm_samples import TEXT, by_transformers, pictures, save, tokenizer

import quickmerge as qm
from quickmerge.recipe import Recipe

SIDE, PATCH = 56, 8
TOWER: dict[str, Any] = {
    "hidden_size": 128, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": PATCH, "initializer_range": 0.2,
}  # fmt: skip
NAME = "QuickmergeLlavaForConditionalGeneration"
PROMPTS = [
    ("w1 w2 <image> w3 w4 w5", 1),
    ("<image> w7 <image> w9 w10 w11", 2),
    ("w20 w21 w22 w23 <image> w24", 1),
]
METHODS = {
    "scope": qm.SCOPE(keep=0.3),
    "trimtokenator": qm.TrimTokenator(keep=0.3, aligned=1),
    "attention": qm.Attention(keep=qm.Count(9)),
    "tome": qm.ToMe(keep=0.4, proportional=False),
    "tofu": qm.ToFu(keep=0.4, switch=0, proportional=False),
    "quickmerge": qm.QuickMergeVision(keep=0.4, proportional=False),
    "pool": qm.Pool(keep=0.3, proportional=False),
    "everything": qm.SCOPE(keep=1.0),
}


def folder_of(folder: Path, tower: str, layer: int = -2) -> str:
    """A random LLaVA."""
    torch.manual_seed(0)
    kind = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}[tower]
    strategy = "default" if tower == "clip" else "full"
    config = hf.LlavaConfig(
        vision_config={"model_type": kind, **TOWER}, text_config={"model_type": "llama", **TEXT}, image_token_id=4,
        vision_feature_layer=layer, vision_feature_select_strategy=strategy, image_seq_length=(SIDE // PATCH) ** 2,
    )  # fmt: skip
    model = hf.LlavaForConditionalGeneration(config).eval()
    sizes = {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False}
    images = hf.CLIPImageProcessor(**sizes) if tower == "clip" else hf.SiglipImageProcessor(size=sizes["size"])
    processor = hf.LlavaProcessor(
        images, tokenizer(extra_special_tokens={"image_token": "<image>"}), patch_size=PATCH,
        vision_feature_select_strategy=strategy, image_token="<image>",
        num_additional_image_tokens=int(tower == "clip"),
    )  # fmt: skip
    return save(folder, model, processor)


def asked(reducer: qm.Reducer) -> dict[str, Any]:
    """What ``hf_overrides`` are."""
    recipe = Recipe(visual=qm.Merge(reducer, positions="consecutive"))
    return {"architectures": [NAME], "quickmerge": recipe.as_dict()}


def prompts() -> list[dict[str, Any]]:
    """As vLLM takes them."""
    images = iter(pictures(8, [(SIDE, SIDE), (80, 40), (30, 90)]))
    return [
        {"prompt": text, "multi_modal_data": {"image": [next(images) for _ in range(count)]}} for text, count in PROMPTS
    ]


def references(folder: str, reducer: qm.Reducer) -> list[list[int]]:
    """What transformers write of them inside `quickmerge.reduce`."""
    model = hf.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    found = []
    for each in prompts():
        images = each["multi_modal_data"]["image"]
        inputs = dict(processor(text=each["prompt"], images=images, return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        with qm.reduce(model, reducer, positions="consecutive"):
            found.append(by_transformers(model, inputs))
    return found
