"""Tiny Qwen2.5-VL and Qwen3-VL as folders, prompts with images of all shapes, and what transformers write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from vllm_samples import TEXT, by_transformers, pictures, save, tokenizer

import quickmerge as qm
from quickmerge.recipe import Recipe

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = [
    (f"w1 w2 {IMAGE} w3 w4 w5", [(196, 140)]),
    (f"{IMAGE} w7 w8 {IMAGE} w9 w10 w11", [(112, 196), (168, 168)]),
    (f"w20 w21 w22 w23 {IMAGE}", [(84, 252)]),
    ("w30 w31 w32", []),
]
"""Texts, and the sizes of their images (width, height): portraits, landscapes, two at once, one at the end, none."""
METHODS = {
    "scope": qm.SCOPE(keep=0.3),
    "trimtokenator": qm.TrimTokenator(keep=0.3, aligned=1),
    "attention": qm.Attention(keep=qm.Count(7)),
    "tome": qm.ToMe(keep=0.4, proportional=False),
    "quickmerge": qm.QuickMergeVision(keep=0.4, proportional=False),
    "pool": qm.Pool(keep=0.3, proportional=False),
    "everything": qm.SCOPE(keep=1.0),
}
SQUARES: dict[str, Any] = {
    "depth": 4, "hidden_size": 128, "num_heads": 4, "intermediate_size": 96, "out_hidden_size": 128, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "initializer_range": 0.2,
}  # fmt: skip
OWN = {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 5, "vision_end_token_id": 6}


def folder_of(folder: Path, family: str) -> str:
    """A random model of ``"qwen2_5_vl"`` or ``"qwen3_vl"``."""
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if family == "qwen2_5_vl":
        vision = {**SQUARES, "window_size": 56, "fullatt_block_indexes": [1, 3]}
        text = {name: value for name, value in TEXT.items() if name != "head_dim"}
        text |= {"rope_parameters": {**rope, "mrope_section": [4, 6, 6]}}
        config: Any = hf.Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **OWN)
        model: Any = hf.Qwen2_5_VLForConditionalGeneration(config)
        kind: Any = hf.Qwen2_5_VLProcessor
        video: Any = hf.Qwen2VLVideoProcessor
    else:
        vision = {**SQUARES, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 2]}
        text = {**TEXT, "rope_parameters": {**rope, "mrope_section": [6, 5, 5], "mrope_interleaved": True}}
        config = hf.Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **OWN)
        model, kind, video = hf.Qwen3VLForConditionalGeneration(config), hf.Qwen3VLProcessor, hf.Qwen3VLVideoProcessor
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
             "size": {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64}}  # fmt: skip
    processor = kind(hf.Qwen2VLImageProcessor(**sizes), tokenizer(), video(**sizes))
    return save(folder, model.eval(), processor)


def asked(name: str, reducer: qm.Reducer) -> dict[str, Any]:
    """What ``hf_overrides`` are."""
    return {"architectures": [name], "quickmerge": Recipe(visual=reducer).as_dict()}


def prompts() -> list[dict[str, Any]]:
    """As vLLM takes them."""
    found = []
    for seed, (text, sizes) in enumerate(PROMPTS):
        images = [pictures(1, [size], seed=10 * seed + i)[0] for i, size in enumerate(sizes)]
        found.append({"prompt": text, **({"multi_modal_data": {"image": images}} if images else {})})
    return found


def references(folder: str, reducer: qm.Reducer) -> list[list[int]]:
    """What transformers write of them inside `quickmerge.reduce`."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = hf.AutoProcessor.from_pretrained(folder)
    found = []
    for each in prompts():
        images = each.get("multi_modal_data", {}).get("image")
        inputs = dict(processor(text=[each["prompt"]], images=images, return_tensors="pt"))
        with qm.reduce(model, reducer):
            found.append(by_transformers(model, inputs))
    return found
