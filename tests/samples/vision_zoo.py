"""Tiny vision transformers of every supported family, and a slow, obvious statement of ToMe inside one."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

DEPTH = 4
IMAGE, PATCH = 48, 8

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": IMAGE,
    "patch_size": PATCH,
    # Large weights, so that attention is far from flat and every token matters.
    "initializer_range": 0.2,
}
_DINO: dict[str, Any] = {"mlp_ratio": 2, "layerscale_value": 0.5}
_VIDEO: dict[str, Any] = {"num_frames": 4}

# name: (config class, stem of the model classes, settings of its own, tokens in front of the patches)
VISION_ZOO: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "beit": ("BeitConfig", "Beit", {"use_relative_position_bias": True, "layer_scale_init_value": 0.5}, 1),
    "beit-shared": (
        "BeitConfig",
        "Beit",
        {"use_shared_relative_position_bias": True, "layer_scale_init_value": 0.5, "use_mean_pooling": True},
        1,
    ),
    "clip": ("CLIPVisionConfig", "CLIPVision", {}, 1),
    "deit": ("DeiTConfig", "DeiT", {}, 2),
    "dinov2": ("Dinov2Config", "Dinov2", _DINO, 1),
    "dinov2-swiglu": ("Dinov2Config", "Dinov2", {**_DINO, "use_swiglu_ffn": True}, 1),
    "dinov2-registers": (
        "Dinov2WithRegistersConfig",
        "Dinov2WithRegisters",
        {**_DINO, "num_register_tokens": 4},
        5,
    ),
    "dinov3": ("DINOv3ViTConfig", "DINOv3ViT", {"num_register_tokens": 4, "layerscale_value": 0.5}, 5),
    "siglip": ("SiglipVisionConfig", "SiglipVision", {}, 0),
    "videomae": ("VideoMAEConfig", "VideoMAE", {**_VIDEO, "tubelet_size": 2, "use_mean_pooling": False}, 0),
    "vit": ("ViTConfig", "ViT", {}, 1),
    "vivit": ("VivitConfig", "Vivit", {**_VIDEO, "tubelet_size": [2, PATCH, PATCH]}, 1),
}


def build(
    name: str, attn: str = "sdpa", dtype: torch.dtype = torch.float32, seed: int = 0, head: str = "Model", **more: Any
) -> Any:
    """A random model of a family, in eval mode; relative positions and layer scales are random too."""
    config_name, stem, own, _ = VISION_ZOO[name]
    config = getattr(transformers, config_name)(**{**_SIZES, **own, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, stem + head)._from_config(config, attn_implementation=attn)
    for key, value in model.named_parameters():
        if "relative_position" in key or "lambda" in key:
            torch.nn.init.normal_(value, std=0.5)
    return model.to(dtype).eval()


def pixels(name: str, rows: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0, size: int = IMAGE) -> Tensor:
    """Random images, or videos for a model of videos."""
    frames = (4,) if "num_frames" in VISION_ZOO[name][2] else ()
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, *frames, 3, size, size, generator=generator).to(dtype)


def match_slowly(keys: Tensor, prefix: int, r: int) -> dict[int, int]:
    """ToMe's matching of the tokens of one image, ``keys (T, d)``: which goes into which."""
    unit = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    best: list[tuple[float, int, int]] = []
    for i in range(prefix, len(keys)):
        if i % 2 == 0:
            pairs = [(float(unit[i] @ unit[j]), j) for j in range(prefix, len(keys)) if j % 2 == 1]
            if pairs:
                top = max(pairs, key=lambda pair: pair[0])
                best.append((top[0], i, top[1]))
    best.sort(key=lambda each: -each[0])
    return {i: j for _, i, j in best[: min(r, (len(keys) - prefix) // 2)]}


def tome_by_hand(model: Any, images: Tensor, r: int, prefix: int) -> tuple[list[Tensor], list[list[int]]]:
    """The last tokens of every image and how many patches each stands for, blocks written out one image at a time.

    For blocks whose attention has projections called ``q_proj``, ``k_proj``, ``v_proj`` and an output projection.
    """
    hidden = model.embeddings(images)
    if hasattr(model, "pre_layrnorm"):
        hidden = model.pre_layrnorm(hidden)
    encoder = getattr(model, "encoder", model)
    blocks = encoder.layers if hasattr(encoder, "layers") else encoder.layer
    outputs, counts = [], []
    for row in hidden:
        x, size = row, [1] * len(row)
        for block in blocks:
            norms = [m for n, m in block.named_children() if "norm" in n]
            attention = getattr(block, "attention", None) or block.self_attn
            normed = norms[0](x)
            heads = model.config.num_attention_heads
            q, k, v = (
                getattr(attention, name)(normed).view(len(x), heads, -1).transpose(0, 1)
                for name in ("q_proj", "k_proj", "v_proj")
            )
            score = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + torch.tensor(size).to(x).log()
            mixed = (score.softmax(-1) @ v).transpose(0, 1).reshape(len(x), -1)
            out = (attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj)(mixed)
            y = x + (block.layer_scale1(out) if hasattr(block, "layer_scale1") else out)
            goes = match_slowly(k.mean(0), prefix, r)
            groups = [[j, *[i for i, to in goes.items() if to == j]] for j in range(len(y)) if j not in goes]
            x = torch.stack([sum(y[m] * size[m] for m in g) / sum(size[m] for m in g) for g in groups])
            size = [sum(size[m] for m in g) for g in groups]
            out = block.mlp(norms[1](x))
            x = x + (block.layer_scale2(out) if hasattr(block, "layer_scale2") else out)
        final = getattr(model, "layernorm", None) or getattr(model, "post_layernorm", None)
        outputs.append(x if hasattr(model, "pre_layrnorm") else final(x))
        counts.append(size)
    return outputs, counts
