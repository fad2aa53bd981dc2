"""What was given as a model: the model inside of what wraps it, and of what kind it is where it can't be served."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.hosts.encoder import VISION_FAMILIES, holds_encoder
from quickmerge.hosts.structure import FAMILIES
from quickmerge.hosts.vlm_structure import VLM_FAMILIES, holds_vlm
from quickmerge.models.compat import is_timm

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
        UnsupportedModelError: for a `DataParallel` over several devices, whose copies of the model a run can't follow.
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
        language: whether it must be a language model, with pictures or without.
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
