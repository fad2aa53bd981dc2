"""Tiny vision transformers: some with settings of their own, and every family of transformers by one rule.

Beside them stands a slow, obvious statement of ToMe inside one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

from quickmerge.models import compat
from quickmerge.models.encoder_inputs import Example, examples

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


# Every family of transformers with a model that reads pixels --------------------------------------------------------

SIGNS = ("image_size", "patch_size", "num_channels", "in_channels", "tubelet_size", "crop_size")
"""Settings by one of which a configuration shows that it is of images or videos."""

SMALL: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "embed_dim", "encoder_hidden_size", "d_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_layers", "encoder_layers"), DEPTH),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads", "num_key_value_heads"), 4),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "mlp_dim"), 48),
    **dict.fromkeys(("image_size", "crop_size"), IMAGE),
    **dict.fromkeys(("num_frames", "frames_per_clip"), 4),
    "patch_size": PATCH,
    "initializer_range": 0.2,
    "layerscale_value": 0.5,
    "layer_scale_init_value": 0.5,
}
"""What a tiny model is given of these settings, as far as its configuration has them as numbers."""

OVERRIDES: dict[str, dict[str, Any]] = {
    "beit": {"use_relative_position_bias": True},
    "data2vec-vision": {"use_relative_position_bias": True},
    "depth_pro": {"image_size": 1536, "patch_size": 384},
    "dinov2_with_registers": {"num_register_tokens": 4},
    "dinov3_vit": {"num_register_tokens": 4},
    "dots3_note_vision_encoder": {"num_hidden_layers": 42, "adapter_in_dim": 32},
    "granite_docling_vision": {"image_size": 64},
    "hiera": {"embed_dim": 96, "image_size": [224, 224], "patch_size": [7, 7], "num_heads": [1, 2, 4, 8]},
    "levit": {"image_size": 224, "patch_size": 16},
    "llama4_vision_model": {"vision_output_dim": 64, "projector_input_dim": 48, "projector_output_dim": 64},
    "lw_detr_vit": {"image_size": 256, "patch_size": 16, "num_windows": 16},
    "molmo2_vision": {"head_dim": 8},
    "ovis2_vision": {"vocab_size": 40, "num_visual_indicator_tokens": 5},
    "sam2_hiera_det_model": {"image_size": [1024, 1024]},
    "swin2sr": {"embed_dim": 180},
    "swinv2": {"image_size": 256, "patch_size": 4},
    "videoprism_vision_model": {"num_frames": 16},
    "vit_mae": {"mask_ratio": 0.0},
}
"""What the rule can't know."""


@cache
def families() -> dict[str, Any]:
    """The configuration class of every ``model_type`` whose configuration is one of images or videos, text apart."""
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in sorted(compat.model_types()):
            config = CONFIG_MAPPING[kind]
            inside = getattr(config, "sub_configs", {})
            if "vision_config" in inside or any("text" in part for part in inside):
                continue
            try:
                made = config()
            except Exception:  # one that has no default is no family's own
                continue
            if any(hasattr(made, sign) for sign in SIGNS):
                found[kind] = config
    return found


def tiny_config(kind: str) -> Any:
    """A small configuration of a family, by the rule and the overrides."""
    config = families()[kind]
    plain = config()
    given: dict[str, Any] = {}
    for name, value in SMALL.items():
        now = getattr(plain, name, None)
        if isinstance(now, (list, tuple)) and name in ("image_size", "patch_size", "crop_size"):
            given[name] = [value] * len(now)
        elif isinstance(now, (int, float)):
            given[name] = value
    if hasattr(plain, "tubelet_size"):
        given["tubelet_size"] = [2, PATCH, PATCH] if isinstance(plain.tubelet_size, (list, tuple)) else 2
    for name in ("depths", "num_heads"):
        now = getattr(plain, name, None)
        if isinstance(now, (list, tuple)):
            given[name] = [1] * len(now)
    return config(**{**given, **OVERRIDES.get(kind, {})})


@cache
def class_of(kind: str) -> Any:
    """The model of a family that reads pixels, the plain one where there are several; None if there is none."""
    config = families()[kind]
    name = config.__module__.replace(".configuration_", ".modeling_")
    try:
        module = import_module(name)
    except ImportError:
        return None
    of_it = [
        each for each in vars(module).values()
        if inspect.isclass(each) and issubclass(each, PreTrainedModel) and each.__module__ == name
        and each.config_class is config and "forward" in vars(each)
    ]  # fmt: skip
    plain = compat.bare_model_class(config)
    if plain in of_it and _shaped_like_a_model(plain):
        return plain
    fit = [each for each in of_it if _shaped_like_a_model(each)]
    named = [each for each in fit if "For" not in each.__name__]
    best = [each for each in named if each.__name__.endswith("Model")] or named or fit
    return best[0] if best else None


def _shaped_like_a_model(kind: Any) -> bool:
    given = list(inspect.signature(kind.forward).parameters)[1:]
    return bool(given) and (given[0].startswith("pixel_values") or "grid_thw" in given)


def build_family(kind: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A tiny random model of a family in eval mode, with fused attention where it has that."""
    made, config = class_of(kind), tiny_config(kind)
    torch.manual_seed(seed)
    try:
        model = made._from_config(config, attn_implementation="sdpa")
    except ValueError:
        torch.manual_seed(seed)
        model = made._from_config(config, attn_implementation="eager")
    for name, value in model.named_parameters():
        if "position" in name or "token" in name:
            torch.nn.init.normal_(value, std=0.5)
    return model.to(dtype).eval()


def read(model: Any, example: Example) -> Any:
    """What a model makes of an example, without gradients; one that predicts beside encoding only encodes."""
    more = {"skip_predictor": True} if "skip_predictor" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        return model(**example.inputs, **more)


def example_of(model: Any, rows: int = 2, seed: int = 0, size: Any = None) -> Example:
    """The first batch that a model reads of those that `quickmerge.models.encoder_inputs.examples` makes."""
    failed: Exception | None = None
    for example in examples(model, rows, seed=seed, size=size):
        try:
            read(model, example)
            return example
        except Exception as error:
            failed = error
    raise AssertionError(f"{type(model).__name__} reads none of the inputs: {failed}")


def row_of(example: Example, row: int) -> Example:
    """One image of a batch."""
    return Example({name: value[row : row + 1] for name, value in example.inputs.items()}, example.grid)


def tensors(output: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of an output, by name."""
    for name, value in output.items():
        if isinstance(value, Tensor):
            yield name, value
