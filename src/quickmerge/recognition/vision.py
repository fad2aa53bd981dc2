"""The tokens of an image: a frozen vision transformer, its class and register tokens left out."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.merge.reducers.base import Reducer
from quickmerge.merge.tokens.budget import layers_of
from quickmerge.merge.vision.vit import reduce_vit
from quickmerge.models.encoder import find_encoder, prefix_of

__all__ = ["check_layers", "encoder_of", "front", "look", "prepare", "width"]


def encoder_of(vision: PreTrainedModel) -> PreTrainedModel:
    """A frozen copy of the vision transformer in a model.

    Raises:
        UnsupportedModelError: there is none that is proven, or it is one of videos.
    """
    if not isinstance(vision, PreTrainedModel):
        raise UnsupportedModelError(f"vision must be a transformers PreTrainedModel, got {type(vision).__name__}")
    base = find_encoder(vision).base
    if getattr(base.config, "tubelet_size", None) is not None:
        raise UnsupportedModelError(f"vision must be a model of images, got one of videos ({type(vision).__name__})")
    if not isinstance(base, PreTrainedModel):
        raise UnsupportedModelError(f"vision must hold a transformers model, got {type(base).__name__}")
    return copy.deepcopy(base).requires_grad_(False).eval()


def check_layers(vision: PreTrainedModel, layers: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """Hidden states by number, 0 for what enters the first block, negative ones from the last on; None: the output.

    Raises:
        ValueError: if there is none of this number, or one twice.
    """
    if layers is None:
        return None
    asked = layers_of(layers)
    depth = len(find_encoder(vision))
    whole = all(isinstance(x, int) and not isinstance(x, bool) and -depth - 1 <= x <= depth for x in asked)
    found = tuple(x % (depth + 1) for x in asked) if whole else ()
    if not found or len(set(found)) != len(found):
        raise ValueError(f"layers must be different whole numbers in {-depth - 1}..{depth}, got {layers!r}")
    return found


def width(vision: PreTrainedModel, layers: tuple[int, ...] | None) -> int:
    """How many features an image token has."""
    return int(vision.config.hidden_size) * (1 if layers is None else len(layers))


def front(vision: PreTrainedModel, size: int) -> int:
    """How many tokens stand in front of the patches of an image of this size, found by looking at a black one.

    Raises:
        UnsupportedModelError: if it can't look at images of this size.
    """
    param = next(vision.parameters())
    pixels = torch.zeros(1, 3, size, size, dtype=param.dtype, device=param.device)
    try:
        with torch.no_grad():
            tokens = _call(vision, pixels, hidden=False).last_hidden_state.shape[1]
    except (ValueError, RuntimeError) as error:
        raise UnsupportedModelError(f"vision can't look at images of image_size={size} pixels: {error}") from error
    return prefix_of(tokens, find_encoder(vision).grid(pixels), type(vision).__name__)


@torch.no_grad()
def look(
    vision: PreTrainedModel, pixels: Tensor, skip: int, layers: tuple[int, ...] | None, reducer: Reducer | None
) -> tuple[Tensor, Tensor | None]:
    """Image tokens ``(B, M, D_v)``, each with mean 0 and variance 1, and which are valid ``(B, M)``; None for all.

    Several layers are put side by side, each brought to that scale by itself. A reducer then acts in the block that
    makes the last of them: it saves tokens of the language model, not of the encoder.

    Raises:
        QuickmergeError: the pixels are no batch of images, or there is no block that a reducer could act in.
    """
    if pixels.ndim != 4 or pixels.shape[1] != 3 or not len(pixels) or not pixels.is_floating_point():
        raise QuickmergeError(f"pixels must be (images, 3, height, width) of floats, got {tuple(pixels.shape)}")
    if reducer is not None and layers is not None and max(layers) == 0:
        raise QuickmergeError("reducer must be None for a recognizer that looks at what enters the first block alone")
    param = next(vision.parameters())
    pixels = pixels.to(param.device, param.dtype)
    block = None if layers is None else max(layers) - 1
    with nullcontext() if reducer is None else reduce_vit(vision, reducer, block) as run:
        out = _call(vision, pixels, hidden=layers is not None)
    states = [out.last_hidden_state] if layers is None else [out.hidden_states[layer] for layer in layers]
    plan = None if run is None or run.call is None or block is None else run.call.plans[block]
    if plan is not None:  # what comes before that block follows, so that all layers have the same tokens
        states = [state if state.shape[1] == plan.slots else plan.merge(state) for state in states]
    tokens = torch.cat([F.layer_norm(state, state.shape[-1:]) for state in states], -1)[:, skip:]
    last = None if run is None or run.call is None else run.call.last
    return tokens, None if last is None or last.valid is None else last.valid[:, skip:]


def prepare(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Images ``(B, 3, H, W)`` in [0, 1] scaled to cover ``size``, cut to it around their centre, and standardised."""
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        raise QuickmergeError(f"images must be (images, 3, height, width) of floats, got {tuple(images.shape)}")
    height, wide = images.shape[-2:]
    if (height, wide) != (size, size):
        scale = size / min(height, wide)
        target = [max(size, round(height * scale)), max(size, round(wide * scale))]
        images = F.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = (target[0] - size) // 2, (target[1] - size) // 2
        images = images[..., top : top + size, left : left + size]
    scale_of = [torch.tensor(each, dtype=images.dtype, device=images.device)[:, None, None] for each in (mean, std)]
    return (images - scale_of[0]) / scale_of[1]


def _call(vision: nn.Module, pixels: Tensor, *, hidden: bool) -> Any:
    more: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
    size = getattr(vision.config, "image_size", None)
    fits = size is None or tuple(pixels.shape[-2:]) == ((size, size) if isinstance(size, int) else tuple(size))
    if not fits and "interpolate_pos_encoding" in inspect.signature(vision.forward).parameters:
        more["interpolate_pos_encoding"] = True
    return vision(pixel_values=pixels, **more)
