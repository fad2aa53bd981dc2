"""Every image-text-to-text family that transformers registers, as a tiny random model with images made by hand.

A family's configuration is its own default with small numbers in the place of large ones, by the names of settings
(`TEXT`, `VISION`); what a family checks beyond that stands in `OWN`. Pixels are made by what its
``get_image_features`` takes, and the placeholders that an image needs are counted by asking it.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor

from quickmerge.models.compat import image_text_names

BOS, EOS, IMAGE, VIDEO, SOUND, FILM, START, END = 1, 2, 90, 91, 92, 93, 88, 89
WORDS = (3, 80)
DEPTH = 4
SIDE, PATCH, MERGE = 56, 7, 2

TEXT: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
    "initializer_range": 0.2, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": 0,
    "moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "qk_head_dim": 8, "sliding_window": 512, "mlp_dim": 48, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "global_head_dim": 8,
    "num_global_key_value_heads": 2, "text_hidden_size": 32, "moe_num_experts": 4, "moe_k": 2,
}  # fmt: skip
"""Settings of a language model, and of what has no other."""

VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "num_heads": 2,
    "depth": 3, "image_size": SIDE, "patch_size": PATCH, "initializer_range": 0.3, "embed_dim": 32,
    "out_hidden_size": 32, "num_key_value_heads": 2, "head_dim": 16, "mlp_dim": 40, "projection_dim": 32,
    "text_hidden_size": 32, "base_channels": 32,
}  # fmt: skip
"""Settings of a vision tower."""

TOWERS = ("vision", "vit", "image", "vqmodel", "vq_", "qformer", "sam", "audio")
IDS = {"image_token_id": IMAGE, "image_token_index": IMAGE, "video_token_id": VIDEO, "video_token_index": VIDEO}

ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}

OWN: dict[str, Any] = {}
"""What a family needs beside small numbers: of its configuration, and of its images."""


def small(config: Any, table: dict[str, Any]) -> dict[str, Any]:
    """The settings by which a configuration becomes a small one; what they don't name it works out by itself."""
    out: dict[str, Any] = {}
    for key, value in vars(config).items():
        if isinstance(value, transformers.PretrainedConfig):
            part = VISION if any(word in key for word in TOWERS) else TEXT
            out[key] = {"model_type": value.model_type, **small(value, part)}
        elif key in IDS:
            out[key] = IDS[key]
        elif key.endswith("token_id") and isinstance(value, int) and value >= 97:
            kinds = {"audio": SOUND, "video": FILM, "end": END, "eo": END, "": START}
            out[key] = next(token for word, token in kinds.items() if word in key)
        elif key in table and value is not None and not isinstance(value, (list, tuple, dict)):
            out[key] = table[key]
    types = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if len(types) > 1:
        deep = out.get("num_hidden_layers", DEPTH)
        # As many kinds of blocks as there are, the last kind last.
        out["layer_types"] = [types[min(i * len(types) // deep, len(types) - 1)] for i in range(deep)]
    return out


def merged(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """``a`` with ``b`` in it, however deep."""
    out = dict(a)
    for key, value in b.items():
        deep = isinstance(value, dict) and isinstance(out.get(key), dict) and key.endswith("config")
        out[key] = merged(out[key], value) if deep else value
    return out


def model_class(family: str) -> Any:
    """The class of a family."""
    return getattr(transformers, image_text_names()[family])


def build(family: str, attn: str = "sdpa", seed: int = 0) -> Any:
    """A tiny random model of a family, in eval mode."""
    cls = model_class(family)
    own = OWN.get(family, {})
    given = own.get("config", {})
    made = cls.config_class(**own.get("start", {}))
    config = cls.config_class(**merged(small(made, TEXT), given))
    torch.manual_seed(seed)
    try:
        model = cls._from_config(config, attn_implementation=attn).eval()
    except ValueError as error:
        if "does not support an attention implementation" not in str(error):
            raise
        torch.manual_seed(seed)
        model = cls._from_config(config, attn_implementation="eager").eval()
    if next(model.parameters()).is_meta:
        return model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What begins at nothing, such as a newline or a gate, shall be seen.
            if (not bool(parameter.any()) and "bias" not in name) or bool(parameter.isnan().any()):
                parameter.normal_(0, 0.2)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = EOS
        model.generation_config.pad_token_id = 0
        model.generation_config.bos_token_id = BOS
    return model


GRIDS = [(1, 8, 4), (1, 4, 8), (1, 8, 8)]
"""Patches of three images where images are packed into one sequence."""


def takes(model: Any) -> list[str]:
    """What the model's ``get_image_features`` is given."""
    return list(inspect.signature(model.base_model.get_image_features).parameters)


def images(model: Any, family: str, which: list[int]) -> dict[str, Any]:
    """The pixels of images 0 to 2, and what tells of their sizes."""
    own = OWN.get(family, {})
    names = takes(model)
    noise = torch.Generator().manual_seed(17)
    vision = getattr(model.config, "vision_config", None)
    side = own.get("side", getattr(vision, "image_size", SIDE))
    side = side if isinstance(side, int) else SIDE
    if "pixels" in own:
        return own["pixels"](model, which, noise)
    grid = next((name for name in names if name.endswith("grid_thw")), None)
    if grid is not None:
        width = own.get("width")
        if width is None:
            patch = vision.patch_size
            width = (3 * getattr(vision, "temporal_patch_size", 1) * patch * patch,)
        every = [torch.randn(t * h * w, *width, generator=noise) for t, h, w in GRIDS]
        return {
            "pixel_values": torch.cat([every[i] for i in which]), grid: torch.tensor([GRIDS[i] for i in which]),
        }  # fmt: skip
    crops = own.get("crops")
    shape = (3, side, side) if crops is None else (crops, 3, side, side)
    pixels = torch.randn(3, *shape, generator=noise)[which]
    out: dict[str, Any] = {"pixel_values": pixels}
    if "image_sizes" in names and own.get("sizes", ()) is not None:
        sizes = own.get("sizes", [(side, side)] * 3)
        out["image_sizes"] = torch.tensor([sizes[i] for i in which])
    return out


@torch.no_grad()
def count(model: Any, family: str, i: int) -> int:
    """How many placeholders an image needs."""
    given = {k: v for k, v in images(model, family, [i]).items() if k in takes(model)}
    out = model.base_model.get_image_features(**given)
    made = out.last_hidden_state if out.pooler_output is None else out.pooler_output
    if made is None:  # it has them elsewhere, by block
        return sum(map(len, out.deepstack_features[0][1]))
    each = [made] if isinstance(made, Tensor) else list(made)
    return sum(x.shape[:-1].numel() for x in each)


def prompt(model: Any, family: str, rows: list[list[int]], order: str = "middle", seed: int = 0) -> dict[str, Any]:
    """A batch, padded on the left: each row words and its images, which come ``order``: first, last, or in the middle.

    Images are set off by a token in front and one behind.
    """
    words = torch.Generator().manual_seed(seed)

    def say(n: int) -> list[int]:
        return torch.randint(*WORDS, (n,), generator=words).tolist()

    texts = []
    for row, which in enumerate(rows):
        shown: list[int] = []
        for i in which:
            shown += [START, *[IMAGE] * count(model, family, i), END]
        before, behind = say(2 + row), say(4 + 2 * row)
        text = {"first": [*shown, *before, *behind], "last": [*before, *behind, *shown]}
        texts.append(torch.tensor([BOS, *text.get(order, [*before, *shown, *behind])]))
    width = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(t, (width - len(t), 0)) for t in texts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(t), (width - len(t), 0)) for t in texts])
    return given(model, family, ids, mask, rows)


def given(model: Any, family: str, ids: Tensor, mask: Tensor, rows: list[list[int]]) -> dict[str, Any]:
    """What a model is called with for ids with images."""
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    which = [i for row in rows for i in row]
    if which:
        inputs |= images(model, family, which)
    group = OWN.get(family, {}).get("group")
    if group is not None and which:
        inputs = group(inputs, rows)
    kinds = (ids == IMAGE).int()
    names = inspect.signature(model.forward).parameters
    for name in ("mm_token_type_ids", "token_type_ids", "moe_mm_token_type_ids"):
        if name in names:
            inputs[name] = kinds
    return inputs


def row_of(model: Any, family: str, rows: list[list[int]], i: int, order: str = "middle") -> dict[str, Any]:
    """Row ``i`` of a batch alone, without padding."""
    batch = prompt(model, family, rows, order)
    ids = batch["input_ids"][i][batch["attention_mask"][i].bool()][None]
    return given(model, family, ids, torch.ones_like(ids), [rows[i]])


def write(model: Any, inputs: dict[str, Any], steps: int = 4, **more: Any) -> Tensor:
    """What the model writes, greedily, never ending early nor writing a placeholder: ``(B, steps)``."""
    out: Tensor = model.generate(
        **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, num_beams=1,
        suppress_tokens=[IMAGE, VIDEO, EOS], **more,
    )  # fmt: skip
    return out[:, -steps:]


# What families need beside small numbers ----------------------------------------------------------------------------


def _grid_text(**more: Any) -> dict[str, Any]:
    return {"text_config": {"rope_parameters": dict(ROPE), **more}}


def _tiled(inputs: dict[str, Any], rows: list[list[int]]) -> dict[str, Any]:
    """Images grouped by the rows of the batch, padded with black ones."""
    pixels, most, start = inputs["pixel_values"][0], max(map(len, rows)), 0
    grouped = torch.zeros(len(rows), most, *pixels.shape[1:])
    for i, row in enumerate(rows):
        grouped[i, : len(row)] = pixels[start : start + len(row)]
        start += len(row)
    out = {**inputs, "pixel_values": grouped}
    if "pixel_attention_mask" in inputs:
        out["pixel_attention_mask"] = torch.arange(most) < torch.tensor([[len(row)] for row in rows])
    return out


def _one_row(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    side = model.config.vision_config.image_size
    return {"pixel_values": torch.randn(3, 3, side, side, generator=noise)[which][None]}


def _varied(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Images of several sizes in one tensor, padded, and their sizes."""
    sizes = [(SIDE, SIDE), (SIDE, 2 * PATCH), (4 * PATCH, SIDE)]
    pixels = torch.randn(3, 3, SIDE, SIDE, generator=noise)
    return {"pixel_values": pixels[which], "image_sizes": torch.tensor([sizes[i] for i in which])}


def _shaped(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Patches of images of several shapes, padded to one length."""
    shapes = [(4, 8), (8, 4), (4, 4)]
    width = 3 * model.config.vision_config.patch_size**2
    pixels = torch.randn(3, 32, width, generator=noise)
    mask = torch.stack([(torch.arange(32) < h * w).long() for h, w in shapes])
    return {
        "pixel_values": pixels[which], "spatial_shapes": torch.tensor([shapes[i] for i in which]),
        "pixel_attention_mask": mask[which],
    }  # fmt: skip


def _merging(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    width = 3 * model.config.vision_config.patch_size**2
    every = [torch.randn(t * h * w, width, generator=noise) for t, h, w in GRIDS]
    return {
        "pixel_values": torch.cat([every[i] for i in which]),
        "image_grid_thw": torch.tensor([GRIDS[i] for i in which]),
        "image_merge_sizes": torch.tensor([MERGE] * len(which)),
    }  # fmt: skip


def _crops(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Images of several sizes, each as a whole and cut up, padded to as many crops."""
    sizes = [(SIDE, 2 * SIDE), (SIDE, SIDE), (2 * SIDE, SIDE)]
    pixels = torch.randn(3, 3, 3, SIDE, SIDE, generator=noise)
    return {"pixel_values": pixels[which], "image_sizes": torch.tensor([sizes[i] for i in which])}


def _placed(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Patches with their places, padded to one length."""
    shapes = [(4, 8), (8, 4), (4, 4)]
    width = 3 * PATCH**2
    places = torch.full((3, 32, 2), -1)
    for i, (h, w) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        places[i, : h * w] = torch.stack([x, y], -1).flatten(0, 1)
    return {
        "pixel_values": torch.rand(3, 32, width, generator=noise)[which], "image_position_ids": places[which],
    }  # fmt: skip


def _twice(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Images in a low and in a high resolution."""
    low, high = model.config.vision_config.image_size, model.config.high_res_vision_config.image_size
    return {
        "pixel_values": torch.randn(3, 3, low, low, generator=noise)[which],
        "high_res_pixel_values": torch.randn(3, 3, high, high, generator=noise)[which],
    }  # fmt: skip


def _pooled(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Flattened patches of crops, and which of them are pooled to a token."""
    n = SIDE // PATCH
    y, x = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    square = (y * n + x).view(n // 2, 2, n // 2, 2).transpose(1, 2).reshape(-1, 4)
    grids = torch.tensor([[n // 2, n // 2, 0, 0]] * len(which))
    pools = torch.cat([square + n * n * i for i in range(len(which))])
    return {
        "pixel_values": torch.randn(3, n * n, 3 * PATCH**2, generator=noise)[which], "image_token_pooling": pools,
        "image_grids": grids, "image_num_crops": torch.ones(len(which), dtype=torch.long),
    }  # fmt: skip


def _marked(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Tiles of one row, and which of them are no padding."""
    return {**_one_row(model, which, noise), "pixel_attention_mask": torch.ones(1, len(which), dtype=torch.bool)}


def _flat(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Flattened patches, without a tower."""
    return {"pixel_values": torch.randn(3, 9, 3 * model.config.patch_size**2, generator=noise)[which]}


def _asked(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Images, and the question that a query transformer is told."""
    side = model.config.vision_config.image_size
    ids = torch.randint(*WORDS, (3, 5), generator=noise)
    return {"pixel_values": torch.randn(3, 3, side, side, generator=noise)[which], "qformer_input_ids": ids[which]}


def _strip(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    """Patches of all images side by side in one strip, and the sizes of the images."""
    sizes = [(8, 4), (4, 8), (8, 8)]
    strips = [torch.randn(3, PATCH, PATCH * h * w, generator=noise) for h, w in sizes]
    return {
        "pixel_values": torch.cat([strips[i] for i in which], -1)[None],
        "target_sizes": torch.tensor([sizes[i] for i in which]),
    }  # fmt: skip


def _row_tiles(model: Any, which: list[int], noise: torch.Generator) -> dict[str, Any]:
    side = model.config.vision_config.image_size
    pixels = torch.randn(3, 1, 3, side, side, generator=noise)[which]
    return {"pixel_values": pixels}


_PINPOINTS = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE]]
_CLIP = {**VISION, "model_type": "clip_vision_model"}
_SIGLIP = {**VISION, "model_type": "siglip_vision_model"}
_MOSAIC = {"pixels": _crops, "config": {"image_grid_pinpoints": _PINPOINTS}}
_GLM = {"config": {**_grid_text(head_dim=8, rope_parameters={**ROPE, "partial_rotary_factor": 1.0})}}
_QWEN3 = {"config": {**_grid_text(), "vision_config": {"deepstack_visual_indexes": [0, 1]}}}
_SQUARES = {"vision_config": {"fullatt_block_indexes": [1], "window_size": 28}}
_OMNI = {
    "vision_start_token_id": START, "vision_end_token_id": END,
    "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32,
                     "output_dim": 32, "downsample_hidden_size": 8},
}  # fmt: skip
_BOTH = {kind: dict(ROPE) for kind in ("full_attention", "sliding_attention")}
_CODES = {"<image>": IMAGE, **{f"IMGIMG{chr(65 + i % 26)}{chr(65 + i // 26)}Z": 3 + i for i in range(64)}}
_GEMMA4 = {
    "pixels": _placed,
    "config": {"vision_config": {**VISION, "model_type": "gemma4_vision", "pooling_kernel_size": 2, "head_dim": 16},
               "audio_config": None},
}  # fmt: skip

OWN |= {
    "aria": {"config": {"projector_patch_to_query_dict": {64: 16}}},
    "chameleon": {"config": {"vocabulary_map": _CODES}},
    "cohere_compass": {"config": {"text_config": {"rope_parameters": _BOTH},
                                  "vision_config": {"deepstack_visual_indexes": [0, 1]}}},
    "cosmos3_edge": {"config": _grid_text(), "width": (3 * PATCH * PATCH,)},
    "cosmos3_omni": _QWEN3,
    "deepseek_ocr2": {"config": {"text_config": {"num_experts_per_tok": 2, "mlp_layer_types": ["dense"] * DEPTH}}},
    "deepseek_vl_hybrid": {"pixels": _twice},
    "dots3_note": {"config": {"text_config": {"num_key_value_heads": 4}}},
    "emu3": {"config": {"vocabulary_map": _CODES, "vq_config": {"hidden_size": 128}}, "sizes": [(SIDE, SIDE)] * 3},
    "ernie4_5_vl_moe": {"config": {"text_config": {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]},
                                                   "moe_intermediate_size": [16, 16]}}},
    "exaone4_5": {"config": _SQUARES},
    "fast_vlm": {"config": {"vision_config": {"model_type": "mobilenet_v2", "hidden_size": 1280}}},
    "gemma3": {"config": {"mm_tokens_per_image": 16}},
    "gemma4": _GEMMA4,
    "shieldgemma2": {"config": {"mm_tokens_per_image": 16}},
    "glm46v": _GLM, "glm4v": _GLM, "glmga": _GLM, "glm_ocr": _GLM, "glm4v_moe": _GLM,
    "glm5_next": {"config": {"text_config": {"num_key_value_heads": 4, "qk_rope_head_dim": 0}}},
    "granite_docling": {"pixels": _marked, "group": _tiled},
    "granite4_vision": {"config": {"image_grid_pinpoints": _PINPOINTS, "downsample_rate": "1/2",
                                   "deepstack_layer_map": [[-2, 0]], "spatial_target_layers": [1, 1, 2, 2],
                                   "vision_config": {"hidden_size": 64},
                                   "qformer_config": {"hidden_size": 64, "encoder_hidden_size": 64}},
                        "pixels": _crops},
    "hunyuan_vl": {"config": _grid_text(head_dim=8)},
    "hy_v4_vl": {"config": _grid_text(qk_rope_head_dim=8)},
    "hyperclovax_vision_v2": {"config": _SQUARES},
    "idefics2": {"pixels": _one_row, "group": _tiled},
    "idefics3": {"pixels": _one_row, "group": _tiled},
    "kimi_k25": {"width": (3, PATCH, PATCH), "config": {
        "projection_hidden_size": 32, "text_config": {"head_dim": 4, "num_key_value_heads": 4}}},
    "minicpm_ocr": {"pixels": _strip}, "minicpmv4_6": {"pixels": _strip}, "minicpmv4_7": {"pixels": _strip},
    "mistral_large4": {"pixels": _varied, "config": {"text_config": {"head_dim": 4, "num_key_value_heads": 4}}},
    "fuyu": {"pixels": _flat},
    "instructblip": {"pixels": _asked},
    "lighton_ocr": {"pixels": _varied}, "mistral3": {"pixels": _varied},
    "lfm2_vl": {"pixels": _shaped, "config": {"text_config": {"layer_types": ["full_attention"] * DEPTH}}},
    "llava": {"sizes": None},
    "llava_next": _MOSAIC, "llava_next_video": _MOSAIC, "llava_onevision": _MOSAIC,
    "molmo2": {"pixels": _pooled, "config": {
        "vision_config": {"image_size": [SIDE, SIDE], "num_position_embeddings": (SIDE // PATCH) ** 2},
        "adapter_config": {"vision_feature_layer": [2, 1]}, "image_patch_id": IMAGE}},
    "muse_glimmer": {"width": (2 * 3 * PATCH * PATCH,),
                     "config": {"out_hidden_size": 128, "projector_hidden_size": 32}},
    "paddleocr_vl": {"width": (3, PATCH, PATCH), "config": {"vision_config": {"image_size": 28}, **_grid_text()}},
    "paligemma": {"config": {"projection_dim": 32, "vision_config": {"projection_dim": 32}}},
    "perception_lm": {"config": {"vision_config": {**_CLIP, "model_args": {"embed_dim": 32}}}, "pixels": _row_tiles},
    "qianfan_ocr": {},
    "qwen2_5_omni_thinker": {"config": {**_grid_text(), **_SQUARES, **_OMNI}},
    "qwen2_5_vl": {"config": {**_grid_text(), **_SQUARES}},
    "qwen2_vl": {"config": _grid_text()},
    "qwen3_omni_moe_thinker": {"config": {**_QWEN3["config"], **_OMNI}},
    "qwen3_vl": _QWEN3, "qwen3_vl_moe": _QWEN3,
    "qwen4_exp": {"config": {"text_config": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
                                             "indexer_budget": 16, "indexer_compress_ratio": 4}}},
    "smolvlm": {"pixels": _one_row, "group": _tiled},
    "step3p7": {"config": {"text_config": {"sliding_window": 512}}},
    "video_llama_3": {"pixels": _merging},
    "vipllava": {"config": {"vision_feature_layers": [-2, -1]}},
}  # fmt: skip


FAMILIES = sorted(image_text_names())

UNBUILT: dict[str, str] = {
    "apertus1p5": "its audio tokenizer has one size",
    "deepseek_ocr2": "its towers have sizes of their own",
    "diffusion_gemma": "it writes by diffusion",
    "dots3_note": "its tower's blocks have sizes of their own",
    "emu3": "its images are codes of a tokenizer of one size",
    "gemma3n": "its tower is one of timm",
    "gemma4_unified": "its patches are joined in front of it",
    "glm5_next": "its placeholders are told by two numbers",
    "mistral_large4": "the plain model does not read a padded batch as its rows",
    "muse_spark": "its tower's blocks have sizes of their own",
    "nemotron_h_omni": "its tower has sizes of its own",
    "unlimited_ocr": "its towers have sizes of their own",
}
"""Rows of which no small model can be built here, and why."""


def reads_text_alone(model: Any) -> bool:
    """Whether the model can be called without images."""
    needed = [p.name for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    return not any(name.startswith(("pixel", "qformer")) for name in needed)
