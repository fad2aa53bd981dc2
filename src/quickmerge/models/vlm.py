"""Finding the parts of a vision-language model that the host acts on, or saying why it can't."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.adapters import check_adapters
from quickmerge.models.compat import is_timm
from quickmerge.models.decoder import FAMILIES, Decoder, check_attention, read_decoder
from quickmerge.models.encoder import VISION_FAMILIES, Encoder, find_encoder, holds_encoder, read_encoder

TOWERS = ("clip_vision_model", "dinov2", "siglip_vision_model")
"""Vision towers that the tests prove inside LLaVA and LLaVA-NeXT."""


@dataclass(frozen=True)
class Family:
    """How the models of one family are built.

    ``tower`` and ``text`` name the parts of the base model. ``layout`` says how the tower's patches become visual
    tokens: ``"patches"``, one each; ``"tiles"``, squares of patches of every image or tile of one; ``"packed"``,
    squares too, of all images in one sequence. ``mrope`` is True where visual tokens have places in three directions,
    and ``raster`` where the patches of a packed sequence are in the order of lines, not of squares.
    """

    tower: str
    text: str
    layout: str
    mrope: bool = False
    raster: bool = False


VLM_FAMILIES: dict[str, Family] = {
    "idefics3": Family("vision_model", "text_model", "tiles"),
    "llava": Family("vision_tower", "language_model", "patches"),
    "llava_next": Family("vision_tower", "language_model", "patches"),
    "paddleocr_vl": Family("visual", "language_model", "packed", mrope=True, raster=True),
    "qwen2_5_vl": Family("visual", "language_model", "packed", mrope=True),
    "qwen2_vl": Family("visual", "language_model", "packed", mrope=True),
    "qwen3_vl": Family("visual", "language_model", "packed", mrope=True),
    "smolvlm": Family("vision_model", "text_model", "tiles"),
}
"""The vision-language models that the tests prove, by ``config.model_type``."""


@dataclass(frozen=True)
class Vlm:
    """A vision-language model: as given, its base, the decoder of its language model, and its vision tower.

    ``attention`` is the module whose attention in the tower is measured, of block ``block``; ``merge`` how many
    patches a visual token spans in each direction; ``encoder`` the tower's parts where its layout is ``"patches"``.
    """

    model: PreTrainedModel
    base: Any
    decoder: Decoder
    tower: Any
    attention: nn.Module
    block: int
    merge: int
    encoder: Encoder | None

    @property
    def name(self) -> str:
        """Its ``model_type``."""
        return str(self.model.config.model_type)

    @property
    def family(self) -> Family:
        """How it is built."""
        return VLM_FAMILIES[self.name]

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
        return getattr(self.config, f"{kind}_token_id", None)


def holds_vlm(model: Any) -> bool:
    """True for a language model with a vision tower, supported or not."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return False
    return getattr(model.config, "vision_config", None) is not None


def find_vlm(model: PreTrainedModel, shared: bool = False) -> Vlm:
    """Find the parts of a vision-language model.

    Args:
        model: a vision-language model.
        shared: whether its language model may be inside a run already, whose attention another one may share.

    Raises:
        UnsupportedModelError: naming the class and what would do, if it is not of a family in `VLM_FAMILIES`, holds
            another vision tower or language model than the tests prove, or is already inside a run.
    """
    base, family, tower, text = _parts(model)
    name = type(model).__name__
    decoder = read_decoder(model, text, shared)
    check_attention(name, tower.config)
    if family.layout == "patches":
        return _with_encoder(model, base, decoder, tower)
    if family.layout == "tiles":
        blocks, merge = tower.encoder.layers, model.config.scale_factor
    else:
        inner = tower.vision_model.encoder.layers if family.raster else tower.blocks
        blocks, merge = inner, tower.config.spatial_merge_size
    # Windowed blocks see a corner each; the last block that sees the whole image is asked.
    block = max(getattr(tower.config, "fullatt_block_indexes", None) or [len(blocks) - 1])
    attention = getattr(blocks[block], "attn", None) or blocks[block].self_attn
    return Vlm(model, base, decoder, tower, attention, block, int(merge), None)


def tower_encoder(vlm: Vlm) -> Encoder:
    """The parts of a model's vision tower, for merging inside it.

    Raises:
        UnsupportedModelError: for a packed tower.
    """
    if vlm.family.layout == "packed":
        raise UnsupportedModelError(
            f"tower must be None for {type(vlm.model).__name__}, whose vision tower reads the patches of all images in "
            "one packed sequence and joins neighbours to squares: they can't be merged one by one; reduce its visual "
            "tokens instead"
        )
    return read_encoder(vlm.tower) if vlm.encoder is None else vlm.encoder


def find_vlm_decoder(model: PreTrainedModel) -> Decoder:
    """The decoder of a vision-language model, which may be inside a run already; see `find_vlm`.

    Raises:
        UnsupportedModelError: if it is not of a family in `VLM_FAMILIES`.
    """
    return read_decoder(model, _parts(model)[3], shared=True)


def _parts(model: PreTrainedModel) -> tuple[Any, Family, Any, Any]:
    """The base model, its family, the tower and the base of the language model."""

    name, kind = type(model).__name__, getattr(model.config, "model_type", None)
    family = VLM_FAMILIES.get(str(kind))
    if family is None or model.base_model is model or not hasattr(model.base_model, family.tower):
        raise UnsupportedModelError(
            f"{name} (model_type {kind!r}) is not supported: reducing visual tokens is proven for the "
            f"...ForConditionalGeneration classes of {', '.join(VLM_FAMILIES)}"
        )
    base = model.base_model
    tower, text = getattr(base, family.tower), getattr(base, family.text)
    if not family.mrope and text.config.model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"{name} holds a language model of type {text.config.model_type!r}, which is not supported: merging is "
            f"proven for {', '.join(FAMILIES)}"
        )
    return base, family, tower, text


def _with_encoder(model: PreTrainedModel, base: Any, decoder: Decoder, tower: Any) -> Vlm:
    name, kind = type(model).__name__, tower.config.model_type
    if kind not in TOWERS:
        raise UnsupportedModelError(
            f"{name} holds a vision tower of type {kind!r}, which is not supported: {', '.join(TOWERS)} are"
        )
    encoder = find_encoder(tower)
    layer = model.config.vision_feature_layer
    layer = layer if isinstance(layer, int) else layer[-1]
    # Of the states that the tower hands out the first is what enters block 0.
    block = (layer if layer >= 0 else layer + len(encoder) + 1) - 1
    if block < 0:
        raise UnsupportedModelError(
            f"{name} has vision_feature_layer {model.config.vision_feature_layer!r}, in front of every block of its "
            "vision tower; a layer behind a block was looked for"
        )
    return Vlm(model, base, decoder, tower, encoder.blocks[block].attention, block, 1, encoder)


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
    text, visual = ", ".join(FAMILIES), ", ".join(VLM_FAMILIES)
    if language:
        would = f"language models of {text} and vision-language models of {visual} are"
    elif kind == INPUTS["pixel_values"]:
        would = f"vision transformers of {', '.join(VISION_FAMILIES)} and of timm are"
    elif "vision" in kind:
        would = f"vision-language models of {visual} are"
    else:
        would = f"decoder-only language models of {text} are"
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
