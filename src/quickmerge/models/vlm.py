"""Finding the parts of a vision-language model that the host acts on, or saying why it can't."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.adapters import check_adapters
from quickmerge.models.compat import is_timm
from quickmerge.models.decoder import Decoder, check_attention, read_decoder
from quickmerge.models.encoder import VISION_FAMILIES, Encoder, find_encoder, holds_encoder, read_encoder
from quickmerge.models.traits import CHUNKED, COMPRESSED, BlockTraits

SQUARES = ("scale_factor", "spatial_merge_size")
"""Settings that say how many patches a visual token spans in each direction."""

FEATURES = "get_image_features"
"""The method of a base model that makes what takes the place of its placeholders."""


VLM_FAMILIES = (
    "aria", "aya_vision", "cohere2_vision", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "deepseek_vl",
    "deepseek_vl_hybrid", "ernie4_5_vl_moe", "exaone4_5", "fast_vlm", "gemma3", "gemma4", "glm46v", "glm4v",
    "glm4v_moe", "glm_ocr", "glmga", "got_ocr2", "granite_docling", "hunyuan_vl", "hy_v4_vl", "hyperclovax_vision_v2",
    "idefics2", "idefics3", "internvl", "janus", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr", "llava",
    "llava_next", "llava_next_video", "llava_onevision", "minicpm_ocr", "minicpmv4_6", "minicpmv4_7", "minimax_m3_vl",
    "mistral3", "molmo2", "muse_glimmer", "ovis2", "paddleocr_vl", "paligemma", "perception_lm", "pp_chart2table",
    "qianfan_ocr", "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_5_moe",
    "qwen3_omni_moe_thinker", "qwen3_vl", "qwen3_vl_moe", "shieldgemma2", "smolvlm", "step3p7", "video_llama_3",
    "video_llava", "vipllava",
)  # fmt: skip
"""``config.model_type`` of the families that the committed table (tests/merge/visual/zoo.json) proves, to be told of.
Nothing is decided by it."""


@dataclass(frozen=True)
class Family:
    """How a model is built, as far as its visual tokens go; found by looking at its parts.

    ``layout`` says how the tower's patches become visual tokens:

    - ``"patches"``: one each, and the projector sees each alone;
    - ``"tiles"``: squares of patches of every image or tile of one, one after another in lines;
    - ``"packed"``: squares too, of all images in one sequence, whose grids are told;
    - ``"traced"``: in a way of its own, which `quickmerge.merge.visual.made_of` finds out when images come;
    - ``"closed"``: there is no stack of blocks with one attention each that could be looked into.

    ``mrope`` is True where visual tokens have places in three directions, ``raster`` where the patches of a packed
    sequence are in the order of lines, not of squares, and ``mosaic`` where crops of an image are put together again.
    """

    layout: str
    mrope: bool = False
    raster: bool = False
    mosaic: bool = False


class Seeing(NamedTuple):
    """A block of a vision tower, with the one module in it that calls the attention function."""

    tower: Any
    block: nn.Module
    attention: nn.Module


@dataclass(frozen=True)
class Vlm:
    """A vision-language model: as given, its base, the decoder of its language model, and its vision tower.

    ``tower`` is None where no model reads the pixels. ``attention`` is the module whose attention in the tower is
    measured, of block ``block``; ``merge`` how many patches a visual token spans in each direction; ``encoder`` the
    tower's parts where its layout is ``"patches"``. ``blocks`` are the tower's, each with its attention, where they
    could be found; of a ``"traced"`` one it is known only later which of them is measured.
    """

    model: PreTrainedModel
    base: Any
    decoder: Decoder
    family: Family
    tower: Any
    attention: nn.Module | None
    block: int
    merge: int
    encoder: Encoder | None
    blocks: tuple[Seeing, ...] = ()

    @property
    def name(self) -> str:
        """Its ``model_type``."""
        return str(self.model.config.model_type)

    @property
    def config(self) -> Any:
        """The configuration of the whole."""
        return self.model.config

    @property
    def deepstack(self) -> int:
        """After how many of the first blocks the decoder adds to its visual tokens what the tower saw lower down."""
        return len(getattr(self.tower, "deepstack_merger_list", ()))

    def token(self, kind: str) -> int | None:
        """The id of the placeholder of an ``"image"`` or a ``"video"``; None if the model knows none."""
        return placeholder(self.config, kind)


def placeholder(config: Any, kind: str = "image") -> int | None:
    """The id of the tokens whose place the features of an ``"image"`` or a ``"video"`` take; None if there is none."""
    for name in (f"{kind}_token_id", f"{kind}_token_index"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    return None


def holds_vlm(model: Any) -> bool:
    """True for a language model with a vision tower, supported or not."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return False
    return getattr(model.config, "vision_config", None) is not None or hasattr(model.base_model, FEATURES)


def find_vlm(model: PreTrainedModel, shared: bool = False) -> Vlm:
    """Find the parts of a vision-language model.

    Args:
        model: a vision-language model.
        shared: whether its language model may be inside a run already, whose attention another one may share.

    Raises:
        UnsupportedModelError: naming the class and the trait that is the reason, if image features don't take the place
            of placeholders in front of a decoder that can be served, or the model is already inside a run.
    """
    base, text = _parts(model)
    name = type(model).__name__
    decoder = read_decoder(model, text, shared, both_ways=True)
    decoder.need("reducing visual tokens", not_shortened)
    towers = _towers(base, text)
    tower = towers[0] if towers else None
    mrope = hasattr(base, "get_rope_index")
    if not any(True for each in towers for _ in _blocks(each)):
        return Vlm(model, base, decoder, Family("closed", mrope), tower, None, -1, 1, None)
    for each in towers:
        check_attention(name, each.config)
    found = None
    if len(towers) == 1:
        found = _patches(model, base, decoder, tower, mrope) or _squares(model, base, decoder, tower, mrope)
    if found is not None:
        return found
    family = Family("traced", mrope)
    blocks = tuple(Seeing(each, *pair) for each in towers for pair in _blocks(each))
    return Vlm(model, base, decoder, family, tower, None, -1, 1, None, blocks)


def not_shortened(block: BlockTraits) -> str | None:
    """The trait for which a block can't read a prompt that became shorter in front of the first; None if it can."""
    if not block.registered:
        return "attention that asks no function of transformers' registry"
    if block.attention in (CHUNKED, COMPRESSED):
        return f"{block.attention} attention, which counts places in the prompt"
    if block.attention is not None and block.positions in ("bias", "learned"):
        told = {"bias": "a bias on its attention by distance", "learned": "learned embeddings of places"}
        return f"{told[block.positions]}, so that what stays can't keep its place"
    return None


def tower_encoder(vlm: Vlm) -> Encoder:
    """The parts of a model's vision tower, for merging inside it.

    Raises:
        UnsupportedModelError: for a tower whose patches can't be merged one by one.
    """
    if vlm.family.layout in ("patches", "tiles"):
        return read_encoder(vlm.tower) if vlm.encoder is None else vlm.encoder
    why = {
        "packed": "reads the patches of all images in one packed sequence and joins neighbours to squares: they can't "
        "be merged one by one",
        "traced": "makes visual tokens of its patches in a way of its own, which must find every patch at its place",
        "closed": "has no stack of blocks with one attention each",
    }[vlm.family.layout]
    raise UnsupportedModelError(
        f"tower must be None for {type(vlm.model).__name__}, whose vision tower {why}; reduce its visual tokens instead"
    )


def find_vlm_decoder(model: PreTrainedModel) -> Decoder:
    """The decoder of a vision-language model, which may be inside a run already; see `find_vlm`.

    Raises:
        UnsupportedModelError: if there is no decoder that image features are read by in place of placeholders.
    """
    return read_decoder(model, _parts(model)[1], shared=True)


def has_grid_places(model: PreTrainedModel) -> bool:
    """Whether visual tokens of a vision-language model have places in a grid, in three directions."""
    return hasattr(model.base_model, "get_rope_index")


def _refuse(name: str, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{name} is not supported, since {why}: reducing visual tokens needs a model whose image features take the "
        "place of placeholder tokens in front of a decoder"
    )


def _parts(model: PreTrainedModel) -> tuple[Any, Any]:
    """The base model that makes image features, and the base of the language model that reads them.

    Raises:
        UnsupportedModelError: naming the trait by which there are no such parts.
    """
    name, base = type(model).__name__, model.base_model
    if getattr(model.config, "is_encoder_decoder", False) or getattr(
        model.config.get_text_config(), "is_encoder_decoder", False
    ):
        raise _refuse(name, "it is an encoder-decoder model, whose encoder reads the image features")
    words = model.get_input_embeddings()
    crossing = next((each for each, _ in model.named_modules() if _crosses(model, each, words)), None)
    if crossing is not None and not hasattr(base, FEATURES):
        raise _refuse(name, f"its language model reads image features by cross-attention (in {crossing})")
    if not hasattr(base, FEATURES):
        raise _refuse(name, f"its base model has no {FEATURES}, which tells what takes the place of placeholders")
    if placeholder(model.config) is None:
        raise _refuse(name, "its configuration names no image_token_id, so there are no placeholders to be found by")
    for module in base.modules():
        if module is base or not isinstance(module, PreTrainedModel):
            continue
        if _stack(module) and any(each is words for each in module.modules()):
            return base, module
    why = "is its own language model" if _stack(base) else "holds no language model with a list of blocks"
    raise _refuse(name, f"its base model {why}, and nothing can be taken out between image features and blocks")


def _crosses(model: nn.Module, name: str, words: nn.Module) -> bool:
    """Whether a module attends to what is not in the text, inside of a part that reads words."""
    if not any(part in name.rpartition(".")[2] for part in ("cross_attn", "crossattention", "encoder_attn")):
        return False
    outer = name.split(".")[:-1]
    holders = [model.get_submodule(".".join(outer[: i + 1])) for i in range(len(outer))]
    return any(each is words for holder in holders for each in holder.modules())


def _stack(module: Any) -> bool:
    depth = getattr(getattr(module, "config", None), "num_hidden_layers", None)
    return any(isinstance(each, nn.ModuleList) and len(each) == depth for each in module.children())


def _towers(base: Any, text: nn.Module) -> list[Any]:
    """The models beside the language model that read pixels, the outermost of them."""
    within, found = set(text.modules()), []
    for module in base.modules():
        if module is base or module in within or not isinstance(module, PreTrainedModel) or text in module.modules():
            continue
        reads = getattr(module, "main_input_name", "") == "pixel_values"
        takes = inspect.signature(module.forward).parameters
        if reads or any(each in takes for each in ("pixel_values", "grid_thw")):
            found.append(module)
            within |= set(module.modules())
    return found


def _blocks(tower: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Blocks of a tower, each with the one module in it that calls the attention function."""
    for stack in tower.modules():
        if not isinstance(stack, nn.ModuleList):
            continue
        for block in stack:
            # What calls the attention function says in which sense it masks.
            attentions = [each for each in block.modules() if hasattr(each, "is_causal")]
            if len(attentions) == 1 and attentions[0] is not block:
                yield block, attentions[0]


def _patches(model: PreTrainedModel, base: Any, decoder: Decoder, tower: Any, mrope: bool) -> Vlm | None:
    """A model each of whose patches is a visual token; None if it isn't one."""
    config, projector = model.config, getattr(base, "multi_modal_projector", None)
    layers = getattr(config, "vision_feature_layer", None)
    strategy = getattr(config, "vision_feature_select_strategy", None)
    if layers is None or strategy is None or projector is None or mrope:
        return None
    chosen = [layers] if isinstance(layers, int) else list(layers)
    packs = getattr(base, "pack_image_features", None)
    wanted = ["image_features", "image_sizes", "vision_feature_select_strategy", "image_newline"]
    if packs is not None and list(inspect.signature(packs).parameters) != wanted:
        return None
    if not _each_alone(projector, tower.config.hidden_size * len(chosen)):
        return None
    try:
        encoder = find_encoder(tower)
    except UnsupportedModelError:
        return None
    # Of the states that the tower hands out the first is what enters block 0.
    layer = chosen[-1]
    block = (layer if layer >= 0 else layer + len(encoder) + 1) - 1
    if block < 0:
        raise UnsupportedModelError(
            f"{type(model).__name__} has vision_feature_layer {layers!r}, in front of every block of its vision tower; "
            "a layer behind a block was looked for"
        )
    family = Family("patches", mosaic=packs is not None)
    return Vlm(model, base, decoder, family, tower, encoder.blocks[block].attention, block, 1, encoder)


PROBE = 4
"""Side of the square of random patches that a projector is tried with."""


@torch.no_grad()
def _each_alone(projector: nn.Module, width: int) -> bool:
    """Whether a projector makes one token of every patch, without looking at the others."""
    weight = next(projector.parameters(), None)
    if weight is None or weight.is_meta:
        return False
    noise = torch.Generator().manual_seed(0)
    x = torch.randn(1, PROBE * PROBE, width, generator=noise).to(weight.device, weight.dtype)
    other = x.clone()
    other[:, 1:] = other[:, 1:].flip(1)
    try:
        one, two = projector(x), projector(other)
    except Exception:  # it takes something else, in whatever way it says so
        return False
    if not isinstance(one, torch.Tensor) or one.shape[:2] != x.shape[:2]:
        return False
    return torch.allclose(one[:, 0].float(), two[:, 0].float(), rtol=1e-3, atol=1e-3)


def _squares(model: PreTrainedModel, base: Any, decoder: Decoder, tower: Any, mrope: bool) -> Vlm | None:
    """A model whose visual tokens are squares of patches; None if it is built in another way.

    Whether they really are is tried with the first image; see `quickmerge.merge.visual.made_of`.
    """
    takes = inspect.signature(tower.forward).parameters
    packed = "grid_thw" in takes and isinstance(getattr(tower.config, "spatial_merge_size", None), int)
    tiles = hasattr(getattr(base, "connector", None), "pixel_shuffle") and "pixel_values" in takes
    if packed:
        raster = not hasattr(tower, "blocks")
        inner = getattr(getattr(tower, "vision_model", tower), "encoder", None) if raster else tower
        blocks = getattr(inner, "layers", None) if raster else tower.blocks
        merge, family = int(tower.config.spatial_merge_size), Family("packed", mrope, raster)
    elif tiles and not mrope and isinstance(getattr(model.config, "scale_factor", None), int):
        blocks = getattr(getattr(tower, "encoder", None), "layers", None)
        merge, family = int(model.config.scale_factor), Family("tiles")
    else:
        return None
    found = dict(_blocks(tower))
    if not isinstance(blocks, nn.ModuleList) or not all(each in found for each in blocks):
        return None
    # Windowed blocks see a corner each; the last block that sees the whole image is asked.
    block = max(getattr(tower.config, "fullatt_block_indexes", None) or [len(blocks) - 1])
    every = tuple(Seeing(tower, *pair) for pair in found.items())
    return Vlm(model, base, decoder, family, tower, found[blocks[block]], block, merge, None, every)


# What was given as a model: the model inside of what wraps it, and of what kind it is where it can't be served.


INPUTS = {
    "pixel_values": "a vision model",
    "pixel_values_videos": "a video model",
    "input_features": "an audio model",
    "input_values": "an audio model",
}
"""What a model is, by what it says to be its main input."""


def unwrapped(model: Any) -> Any:
    """The model inside of `torch.compile`, PEFT, `DataParallel` and `DistributedDataParallel`, however deep.

    A run on the model inside works for what wraps it too. A PEFT model's adapters are in the model inside. What stands
    in none of these is given back as it is.

    Raises:
        UnsupportedModelError: for a `DataParallel` over several devices, whose copies of the model a run can't follow,
            and for active adapters that act on places in a text.
    """
    for _ in range(16):  # wraps don't lie in circles, but who knows
        if not isinstance(model, nn.Module):
            return model
        if isinstance(model, DataParallel) and len(model.device_ids) > 1:
            raise UnsupportedModelError(
                f"model must be on one device, got a DataParallel over {len(model.device_ids)} of them, which copies "
                "it for every forward: use DistributedDataParallel, or the module inside"
            )
        if isinstance(model, (DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]
        elif not isinstance(model, PreTrainedModel) and callable(inner := getattr(model, "get_base_model", None)):
            check_adapters(model)
            model = inner()
        else:
            return model
    return model


def check_kind(model: Any, language: bool = False) -> None:
    """Raise UnsupportedModelError for what is no language model nor a vision model that can be reduced.

    The sentence says what it is, and what would do. Whether a language model is one of the proven families is not
    looked at here.

    Args:
        model: what was given.
        language: whether it must be a language model, with images or without.
    """
    name = type(model).__name__
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"model must be a transformers PreTrainedModel, or a vision transformer of timm, got {_given(model)}"
        )
    if not isinstance(model, PreTrainedModel):
        if not language and any(is_timm(module) for module in model.modules()):
            return
        raise UnsupportedModelError(
            f"model must be a transformers PreTrainedModel, got {name}, a torch module of neither transformers nor "
            "timm: give the model that it holds"
        )
    if holds_vlm(model) or (holds_encoder(model) and not language):
        return
    kind = model_kind(model)
    if kind is None:
        return
    if "vision" in kind and kind != INPUTS["pixel_values"]:
        _parts(model)  # it says which trait is the reason
    visual = "vision-language models whose image features take the place of placeholder tokens"
    text = "decoder-only language models (`quickmerge ls models` lists their families)"
    if language:
        would = f"{text} and {visual} are"
    elif kind == INPUTS["pixel_values"]:
        would = f"vision transformers of {', '.join(VISION_FAMILIES)} and of timm are"
    elif "vision" in kind:
        would = f"{visual} are"
    else:
        would = f"{text} are"
    raise UnsupportedModelError(
        f"{name} (model_type {model.config.model_type!r}) is {kind}, which is not supported: {would}"
    )


def model_kind(model: PreTrainedModel) -> str | None:
    """What a model of transformers is, in words; None for a decoder-only language model, or the base of one."""
    reads = getattr(model, "main_input_name", "input_ids")
    config = model.config
    if reads == "pixel_values" or getattr(config, "vision_config", None) is not None:
        worded = hasattr(config, "text_config") or model.get_output_embeddings() is not None
        return "a vision-language model" if worded else INPUTS["pixel_values"]
    if reads in INPUTS:
        return INPUTS[reads]
    return "an encoder-decoder model" if getattr(config, "is_encoder_decoder", False) else None


def _given(model: object) -> str:
    return repr(model) if model is None or isinstance(model, (str, int, float)) else type(model).__name__
