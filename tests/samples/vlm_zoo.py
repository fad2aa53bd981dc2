"""Tiny vision-language models of every supported family, prompts for them, and what reading fewer tokens must equal."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

import quickmerge as qm

DEPTH = 4
IMAGE, VIDEO, BOS, EOS = 90, 91, 1, 2
START, END = 88, 89
SIDE, PATCH = 28, 7
EXACT = 1e-5
ROWS = [[0], [1, 2], []]
"""Which images the rows of a batch show."""

_TEXT: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": 0,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": SIDE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}
_TOWERS = {
    "clip": {"model_type": "clip_vision_model", **_TOWER},
    "siglip": {"model_type": "siglip_vision_model", **_TOWER},
    "dinov2": {"model_type": "dinov2", **_TOWER, "mlp_ratio": 2, "hidden_act": "gelu"},
}
# What a packed tower sees: squares of 2 x 2 patches.
_ROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_PACKED: dict[str, Any] = {
    "depth": 3,
    "num_heads": 2,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "initializer_range": 0.3,
}

FAMILIES = ("idefics3", "llava", "llava_next", "paddleocr_vl", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "smolvlm")
FLAT = ("idefics3", "llava", "llava_next", "smolvlm")
"""Families with positions in one direction."""


def _llava(kind: str, tower: str = "clip", layer: Any = -2, strategy: str = "", language: str = "llama") -> Any:
    strategy = strategy or ("full" if tower == "siglip" else "default")
    common: dict[str, Any] = {
        "vision_config": dict(_TOWERS[tower]),
        "text_config": {"model_type": language, **_TEXT},
        "image_token_id": IMAGE,
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
        "image_seq_length": 16,
    }
    if kind == "llava":
        return transformers.LlavaConfig(**common)
    pinpoints = [[SIDE, SIDE], [SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    return transformers.LlavaNextConfig(**common, image_grid_pinpoints=pinpoints)


def _tiles(kind: str) -> Any:
    config = transformers.Idefics3Config if kind == "idefics3" else transformers.SmolVLMConfig
    return config(
        vision_config={**_TOWER, "image_size": 2 * SIDE},
        text_config={"model_type": "llama", **_TEXT},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _packed(kind: str) -> Any:
    text = {**_TEXT, "rope_parameters": dict(_ROPE), "tie_word_embeddings": False}
    own = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
    if kind == "qwen2_vl":
        vision = {**_PACKED, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
        return transformers.Qwen2VLConfig(text_config=text, vision_config=vision, **own)
    if kind == "qwen2_5_vl":
        vision = {**_PACKED, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32, "window_size": 16,
                  "fullatt_block_indexes": [1]}  # fmt: skip
        return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **own)
    if kind == "qwen3_vl":
        vision = {**_PACKED, "hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32,
                  "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}  # fmt: skip
        text = {**text, "head_dim": 8, "rope_parameters": {**_ROPE, "mrope_interleaved": True}}
        return transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **own)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 4, "spatial_merge_size": 2, "initializer_range": 0.3}  # fmt: skip
    text = {**text, "head_dim": 8}
    return transformers.PaddleOCRVLConfig(text_config=text, vision_config=vision, **own)


_CLASSES = {
    "idefics3": "Idefics3ForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
    "paddleocr_vl": "PaddleOCRVLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "smolvlm": "SmolVLMForConditionalGeneration",
}


def build(family: str, attn: str = "sdpa", seed: int = 0, **own: Any) -> Any:
    """A random model of a family, in eval mode; ``own`` settings of the LLaVA families."""
    if family.startswith("llava"):
        config = _llava(family, **own)
    else:
        config = _tiles(family) if family in ("idefics3", "smolvlm") else _packed(family)
    torch.manual_seed(seed)
    model = getattr(transformers, _CLASSES[family])._from_config(config, attn_implementation=attn)
    return model.eval()


SHAPES: dict[str, list[tuple[int, int]]] = {
    "llava": [(SIDE, SIDE)] * 3,
    "llava_next": [(40, 56), (SIDE, SIDE), (56, 30)],
    "idefics3": [(2 * SIDE, 2 * SIDE)] * 3,
    "smolvlm": [(2 * SIDE, 2 * SIDE)] * 3,
}
GRIDS = [(1, 8, 6), (1, 4, 8), (1, 6, 6)]
"""Patches of three images of packed families; a token spans 2 x 2."""


def pictures(model: Any, which: list[int], kind: str = "image") -> dict[str, Any]:
    """The pixels of images 0 to 2, as the model's processor would hand them over; a video has three frames."""
    family = model.config.model_type
    noise = torch.Generator().manual_seed(17)
    if family in SHAPES:
        crops = {"llava_next": 5}.get(family, 1)
        side = SHAPES[family][0][0] if family != "llava_next" else SIDE
        every = torch.randn(3, crops, 3, side, side, generator=noise)
        if family == "llava":
            return {"pixel_values": every[which][:, 0]}
        if family == "llava_next":
            return {"pixel_values": every[which], "image_sizes": torch.tensor([SHAPES[family][i] for i in which])}
        return {"pixel_values": every[which][:, 0]}  # grouped by rows later
    frames = 3 if kind == "video" else 1
    grids = [(frames * t, h, w) for t, h, w in GRIDS]
    wide = (3, 4, 4) if family == "paddleocr_vl" else (3 * 2 * 4 * 4,)
    every_grid = [torch.randn(t * h * w, *wide, generator=noise) for t, h, w in grids]
    names = ("pixel_values", "image_grid_thw") if kind == "image" else ("pixel_values_videos", "video_grid_thw")
    return {names[0]: torch.cat([every_grid[i] for i in which]), names[1]: torch.tensor([grids[i] for i in which])}


def counts(model: Any, which: list[int], kind: str = "image") -> list[int]:
    """How many placeholders each image needs."""
    family = model.config.model_type
    if family == "llava":
        return [16] * len(which)
    if family == "llava_next" and which:
        with torch.no_grad():
            return [len(x) for x in model.get_image_features(**pictures(model, which)).pooler_output]
    if family in SHAPES:
        return [16] * len(which)
    return [(3 if kind == "video" else 1) * GRIDS[i][1] * GRIDS[i][2] // 4 for i in which]


def prompt(model: Any, rows: list[list[int]], kind: str = "image", seed: int = 0) -> dict[str, Any]:
    """A padded batch: each row some words, its images with separators between them, and more words.

    Qwen3-VL's videos come frame by frame with words in between.
    """
    family = model.config.model_type
    words = torch.Generator().manual_seed(seed)

    def say(n: int) -> list[int]:
        return torch.randint(3, 80, (n,), generator=words).tolist()

    token, texts = (IMAGE if kind == "image" else VIDEO), []
    for row, which in enumerate(rows):
        ids = [BOS, *say(2 + row)]
        for count in counts(model, which, kind):
            parts = 3 if kind == "video" and family == "qwen3_vl" else 1
            for _ in range(parts):
                ids += [START, *[token] * (count // parts), END, *(say(2) if parts > 1 else [])]
        texts.append(torch.tensor([*ids, *say(4 + 2 * row)]))
    width = max(map(len, texts))
    ids = torch.stack([torch.nn.functional.pad(t, (width - len(t), 0)) for t in texts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(t), (width - len(t), 0)) for t in texts])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    which = [i for row in rows for i in row]
    if which:
        inputs |= pictures(model, which, kind)
    if family in ("idefics3", "smolvlm") and which:
        pixels, most = inputs["pixel_values"], max(map(len, rows))
        grouped = torch.zeros(len(rows), most, *pixels.shape[1:])
        start = 0
        for i, row in enumerate(rows):
            grouped[i, : len(row)] = pixels[start : start + len(row)]
            start += len(row)
        inputs["pixel_values"] = grouped
    if family not in FLAT:
        inputs["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return inputs


def entering(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """What the language model of the dense model is called with for a prompt."""
    text = getattr(model.model, "language_model", None) or model.model.text_model
    seen: dict[str, Any] = {}
    handle = text.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    try:
        with torch.no_grad():
            model.model(**inputs)
    finally:
        handle.remove()
    # The cache has been filled since.
    return {name: value for name, value in seen.items() if name not in ("cache", "past_key_values", "use_cache")}


def text_of(model: Any) -> Any:
    """The language model."""
    return getattr(model.model, "language_model", None) or model.model.text_model


def shortened(model: Any, inputs: dict[str, Any], run: Any, positions: str = "kept") -> dict[str, Any]:
    """What the language model must be called with for a prompt of ONE row without padding, by a run's plans."""
    dense = entering(model, inputs)
    x, n = dense["inputs_embeds"].double(), dense["inputs_embeds"].shape[1]
    place = dense.get("position_ids")
    place = torch.arange(n).expand(1, n) if place is None else place
    visual = torch.zeros(n, dtype=torch.bool)
    new, anchors = {}, []
    low = dense.get("deepstack_visual_embeds")
    lows = [torch.zeros(n, x.shape[-1]).double() for _ in low or ()]
    for full, given in zip(lows, low or (), strict=True):
        full[dense["visual_pos_masks"][0]] = given.double()
    new_low: list[dict[int, Tensor]] = [{} for _ in lows]
    for image in run.images:
        visual[image.columns] = True
        for k in range(image.plan.slots):
            members = image.columns[image.plan.slot[0] == k]
            weight = image.plan.weight[0][image.plan.slot[0] == k].double()
            column = int(image.columns[image.plan.position[0, k]])
            assert column in members.tolist()
            new[column] = weight @ x[0, members]
            for full, out in zip(lows, new_low, strict=True):
                out[column] = weight @ full[members]
            anchors.append(column)
    kept = sorted([*(~visual).nonzero().flatten().tolist(), *anchors])
    out = {
        "inputs_embeds": torch.stack([new.get(c, x[0, c]) for c in kept])[None].float(),
        "position_ids": place[..., kept] if positions == "kept" else torch.arange(len(kept))[None],
        "attention_mask": torch.ones(1, len(kept), dtype=torch.long),
    }
    out["next"] = int(place.max()) + 1 if positions == "kept" else len(kept)
    if low is not None:
        left = visual[kept]
        out["visual_pos_masks"] = left[None]
        out["deepstack_visual_embeds"] = [torch.stack([o[c] for c in kept if visual[c]]).float() for o in new_low]
    return out


@torch.no_grad()
def greedy(model: Any, given: dict[str, Any], steps: int) -> tuple[list[int], Tensor]:
    """Greedy decoding without a cache, from what the language model is called with; and the first step's logits."""
    given = dict(given)
    following, ids, first = given.pop("next"), [], torch.zeros(0)
    for _ in range(steps):
        logits = model.lm_head(text_of(model)(**given, use_cache=False).last_hidden_state)
        first = logits if not len(first) else first
        ids.append(int(logits[0, -1].argmax()))
        token = model.get_input_embeddings()(torch.tensor([[ids[-1]]]))
        given["inputs_embeds"] = torch.cat([given["inputs_embeds"], token], 1)
        place = given["position_ids"]
        given["position_ids"] = torch.cat([place, torch.full_like(place[..., :1], following)], -1)
        given["attention_mask"] = torch.cat([given["attention_mask"], torch.ones(1, 1, dtype=torch.long)], 1)
        if "visual_pos_masks" in given:
            more = torch.zeros(1, 1, dtype=torch.bool)
            given["visual_pos_masks"] = torch.cat([given["visual_pos_masks"], more], 1)
        following += 1
    return ids, first


def row_of(model: Any, rows: list[list[int]], i: int, kind: str = "image", seed: int = 0) -> dict[str, Any]:
    """Row ``i`` of a batch alone, without padding."""
    batch = prompt(model, rows, kind, seed)
    ids = batch["input_ids"][i][batch["attention_mask"][i].bool()][None]
    alone = prompt(model, [rows[i]], kind, seed)
    alone["input_ids"], alone["attention_mask"] = ids, torch.ones_like(ids)
    if "mm_token_type_ids" in alone:
        alone["mm_token_type_ids"] = (ids == IMAGE).int() + 2 * (ids == VIDEO).int()
    return alone


METHODS = {
    "random": qm.Random(keep=0.4),
    "scope": qm.SCOPE(keep=0.4),
    # hand-built embeddings can't ask for log(size) in attention
    "tome": qm.ToMe(keep=0.4, proportional=False),
    "quickmerge": qm.QuickMergeVision(keep=0.4, operator="average", proportional=False),
    "trimtokenator": qm.TrimTokenator(keep=0.4),
    "attention": qm.Attention(keep=qm.Count(3)),
}
MODELS: dict[Any, Any] = {}


def model_of(family: str, **own: Any) -> Any:
    """A model that is built once."""
    key = (family, *sorted(own.items()))
    if key not in MODELS:
        MODELS[key] = build(family, **own)
    return MODELS[key]


def write(model: Any, inputs: dict[str, Any], steps: int = 5, **more: Any) -> Tensor:
    """What the model writes, greedily, never ending early: ``(B, steps)``."""
    out: Tensor = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False, **more)
    return out[:, -steps:]
