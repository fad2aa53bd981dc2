"""Small vision transformers with random weights, one of each family, and images for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
IMAGE = {"image_size": 32, "patch_size": 8}
LABELS = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
VIDEO = {"image_size": 16, "num_frames": 4}

CLASSIFIERS: dict[str, tuple[type[Any], Any, int]] = {
    "vit": (hf.ViTForImageClassification, lambda: hf.ViTConfig(**SIZE, **IMAGE, **LABELS), 1),
    "deit": (hf.DeiTForImageClassificationWithTeacher, lambda: hf.DeiTConfig(**SIZE, **IMAGE, **LABELS), 2),
    "beit": (
        hf.BeitForImageClassification,
        lambda: hf.BeitConfig(**SIZE, **IMAGE, **LABELS, use_relative_position_bias=True, vocab_size=8),
        1,
    ),
    "dinov2": (
        hf.Dinov2ForImageClassification, lambda: hf.Dinov2Config(**SIZE, **IMAGE, **LABELS, mlp_ratio=2), 1
    ),
    "registers": (
        hf.Dinov2WithRegistersForImageClassification,
        lambda: hf.Dinov2WithRegistersConfig(**SIZE, **IMAGE, **LABELS, mlp_ratio=2, num_register_tokens=4),
        5,
    ),
    "clip": (
        hf.CLIPForImageClassification,
        lambda: hf.CLIPConfig(vision_config={**SIZE, **IMAGE}, text_config={**SIZE, "vocab_size": 8}, **LABELS),
        1,
    ),
    "siglip": (
        hf.SiglipForImageClassification,
        lambda: hf.SiglipConfig(vision_config={**SIZE, **IMAGE}, text_config={**SIZE, "vocab_size": 8}, **LABELS),
        0,
    ),
    "videomae": (
        hf.VideoMAEForVideoClassification,
        lambda: hf.VideoMAEConfig(**SIZE, **VIDEO, **LABELS, patch_size=8, tubelet_size=2),
        0,
    ),
    "vivit": (
        hf.VivitForVideoClassification,
        lambda: hf.VivitConfig(**SIZE, **VIDEO, **LABELS, tubelet_size=[2, 8, 8]),
        1,
    ),
}  # fmt: skip
"""By family: a classifier, its configuration, and how many tokens stand in front of the patches."""

BARE: dict[str, tuple[type[Any], Any, int]] = {
    "dinov3": (
        hf.DINOv3ViTModel, lambda: hf.DINOv3ViTConfig(**SIZE, **IMAGE, num_register_tokens=2), 3
    ),
    "siglip-pooled": (hf.SiglipVisionModel, lambda: hf.SiglipVisionConfig(**SIZE, **IMAGE), 0),
}  # fmt: skip
"""The same for models without a classifier."""


def make(family: str, seed: int = 0, **changes: Any) -> tuple[Any, int]:
    """A model with every weight drawn, in evaluation mode, and its prefix."""
    kind, config, prefix = {**CLASSIFIERS, **BARE}[family]
    made = config()
    for name, value in changes.items():
        setattr(made, name, value)
    torch.manual_seed(seed)
    model = kind(made).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What starts at one stays near it; else nothing is left at what it starts as.
            nn.init.normal_(parameter, 1.0 if "norm" in name and "weight" in name else 0.0, 0.1)
    return model, prefix


def pictures(family: str, batch: int = 2, seed: int = 0, size: tuple[int, int] = (32, 32)) -> Tensor:
    """Images, or clips for a model of videos."""
    draws = torch.Generator().manual_seed(seed)
    if family in ("videomae", "vivit"):
        return torch.randn(batch, 4, 3, 16, 16, generator=draws)
    return torch.randn(batch, 3, *size, generator=draws)


def answer(output: Any) -> Tensor:
    """What a model is asked for: logits, else what it pools, else the last features."""
    for name in ("logits", "pooler_output"):
        if getattr(output, name, None) is not None:
            return getattr(output, name)
    return output.last_hidden_state
