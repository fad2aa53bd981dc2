"""Finding the parts of a vision transformer that the host acts on, or saying why it can't."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import (
    TIMM_ATTENTION,
    TIMM_BASE,
    TIMM_BLOCK,
    attention_implementation,
    has_timm_grid,
    is_timm,
    timm_grid,
)
from quickmerge.models.decoder import IMPLEMENTATIONS, PREFIX

VISION_FAMILIES = (
    "beit",
    "clip_vision_model",
    "deit",
    "dinov2",
    "dinov2_with_registers",
    "dinov3_vit",
    "siglip_vision_model",
    "videomae",
    "vit",
    "vivit",
)
"""``config.model_type`` of the vision transformers that the tests prove; models that hold one of them work too."""

SECOND_NORMS = ("layernorm_after", "norm2", "layer_norm2")
FEED_FORWARDS = ("mlp", "output")
STACKS = ("layers", "layer")


@dataclass(frozen=True)
class Block:
    """A pre-norm block: ``y = x + attention(norm(x))``, then ``y + feed_forward(second_norm(y))``.

    ``adds_residual`` says that ``feed_forward`` is a module that is given ``y`` and adds it itself.
    """

    module: nn.Module
    attention: nn.Module
    second_norm: nn.Module
    feed_forward: nn.Module
    adds_residual: bool


@dataclass(frozen=True)
class Encoder:
    """A vision transformer: the model as given, the encoder inside it, its blocks, and what pools its last tokens."""

    model: nn.Module
    base: nn.Module
    blocks: tuple[Block, ...]
    pooler: nn.Module | None

    def __len__(self) -> int:
        return len(self.blocks)

    @property
    def config(self) -> Any:
        """The encoder's own configuration."""
        return self.base.config

    def has_rising(self, blocks: tuple[Any, ...]) -> bool:
        """True for at least one whole number, all in 0..L-1 and rising."""
        whole = all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < len(self) for x in blocks)
        return bool(blocks) and whole and all(a < b for a, b in pairwise(blocks))

    def grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """How many patches ``(T, H, W)`` images ``(B, C, H, W)`` or videos ``(B, T, C, H, W)`` are cut into.

        To a compiler these are numbers, so that each size of image gets a graph of its own: what can be said of a
        schedule and a matching over a number that isn't known takes it hours to find out.
        """
        patch = self.config.tubelet_size if hasattr(self.config, "tubelet_size") else self.config.patch_size
        tall, wide = index(pixels.shape[-2]), index(pixels.shape[-1])
        frames = index(pixels.shape[1]) if pixels.ndim == 5 else 1
        if isinstance(patch, int):
            depth, height, width = (patch if pixels.ndim == 5 else 1, *_pair(self.config.patch_size))
        else:
            depth, height, width = (1, *patch)[-3:]
        return frames // depth, tall // height, wide // width


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def find_encoder(model: PreTrainedModel) -> Encoder:
    """Find the vision transformer in ``model`` by its structure.

    Raises:
        UnsupportedModelError: naming the class and what was looked for, if there is no vision transformer of a family
            in `VISION_FAMILIES`, or several, if a block is not built as `Block` says, or if the attention
            implementation is not one that the host can stand in front of.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name, found = type(model).__name__, list(_towers(model))
    if len(found) != 1:
        raise UnsupportedModelError(
            f"{name} (model_type {model.config.model_type!r}) holds {len(found)} vision transformers that could be "
            f"served, exactly one was looked for, of a family of {', '.join(VISION_FAMILIES)}"
        )
    base, stack = found[0]
    implementation = attention_implementation(base.config)
    if implementation.startswith(PREFIX):
        raise UnsupportedModelError(f"{name} is already inside a quickmerge run; leave that first")
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attention as {implementation!r}, which merging can't stand in front of: "
            f"load it with attn_implementation set to one of {', '.join(IMPLEMENTATIONS)}"
        )
    blocks = tuple(_block(name, module) for module in stack)
    pooler = getattr(base, "pooler", None) or getattr(base, "head", None)
    return Encoder(model, base, blocks, pooler if isinstance(pooler, nn.Module) else None)


def read_encoder(base: PreTrainedModel) -> Encoder:
    """The parts of a vision transformer that is no family of `VISION_FAMILIES`, but built like them: a tower of tiles.

    Raises:
        UnsupportedModelError: if there is no list of its blocks, or a block is not built as `Block` says.
    """
    name, stack = type(base).__name__, _stack(base)
    if stack is None:
        raise UnsupportedModelError(f"{name} has no list of its blocks where one was looked for")
    return Encoder(base, base, tuple(_block(name, module) for module in stack), None)


def holds_encoder(model: Any) -> bool:
    """True if ``model`` holds a vision transformer of one of the proven families and is no language model."""
    if not isinstance(model, PreTrainedModel):
        return False
    return model.get_output_embeddings() is None and any(True for _ in _towers(model))


def _towers(model: PreTrainedModel) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Every outermost model of a proven family with its list of blocks."""
    seen: list[nn.Module] = []
    for module in model.modules():
        kind = getattr(getattr(module, "config", None), "model_type", None)
        if not isinstance(module, PreTrainedModel) or kind not in VISION_FAMILIES:
            continue
        # An encoder that only holds the blocks is a model of its own in some families; what reads pixels is meant.
        if module.main_input_name != "pixel_values" or any(module in set(outer.modules()) for outer in seen):
            continue
        if not hasattr(module, "embeddings"):
            continue
        seen.append(module)
        stack = _stack(module)
        if stack is not None:
            yield module, stack


def _stack(base: nn.Module) -> nn.ModuleList | None:
    depth = base.config.num_hidden_layers  # type: ignore[union-attr]
    for holder in (base, *base.children()):
        for name in STACKS:
            stack = getattr(holder, name, None)
            if isinstance(stack, nn.ModuleList) and len(stack) == depth:
                return stack
    return None


def _block(name: str, module: nn.Module) -> Block:
    norm = next((getattr(module, each) for each in SECOND_NORMS if hasattr(module, each)), None)
    feed = next((each for each in FEED_FORWARDS if isinstance(getattr(module, each, None), nn.Module)), None)
    # What calls the attention function says in which sense it masks.
    attentions = [each for each in module.modules() if hasattr(each, "is_causal")]
    if norm is None or feed is None or len(attentions) != 1:
        raise UnsupportedModelError(
            f"{name} has a block {type(module).__name__} with {len(attentions)} attention modules, "
            f"{'a' if norm is not None else 'no'} second norm and {'a' if feed else 'no'} feed-forward module; "
            "one of each was looked for"
        )
    return Block(module, attentions[0], norm, getattr(module, feed), adds_residual=feed == "output")


def pixels_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The images or videos that a vision transformer of transformers was called with.

    Raises:
        ValueError: if there are none.
    """
    pixels = args[0] if args else kwargs.get("pixel_values")
    if not isinstance(pixels, Tensor):
        raise ValueError("pixel_values must be a tensor of images or videos, got " + type(pixels).__name__)
    return pixels


def prefix_of(tokens: int, grid: tuple[int, int, int], name: str) -> int:
    """How many of ``tokens`` stand in front of the patches: class, distillation and register tokens.

    Raises:
        UnsupportedModelError: if there are fewer tokens than patches.
    """
    prefix = tokens - math.prod(grid)
    if prefix < 0:
        raise UnsupportedModelError(
            f"{name} made {tokens} tokens of {math.prod(grid)} patches {grid}; more were expected"
        )
    return prefix


# Finding the parts of a vision transformer of timm that the host acts on, or saying why it can't.
#
# timm is never imported here: a model of it brings it along, and is known by where its class comes from.


RUN = "quickmerge_run"
"""Name under which a model holds the run that it is inside of."""


@dataclass(frozen=True)
class TimmConfig:
    """What is asked of an encoder's configuration: the channels of all heads together."""

    hidden_size: int


@dataclass(frozen=True)
class TimmEncoder(Encoder):
    """A vision transformer of timm; ``pooler`` is its attention pooling, or None."""

    @property
    def config(self) -> TimmConfig:
        """The encoder's sizes; timm's models have no configuration."""
        attention: Any = self.blocks[0].attention
        return TimmConfig(attention.num_heads * attention.head_dim)

    def grid(self, pixels: Tensor) -> tuple[int, int, int]:
        """How many patches ``(1, H, W)`` images ``(B, C, H, W)`` are cut into, padding at the border included."""
        # numbers to a compiler too, as in every encoder
        return 1, *timm_grid(self.base, (index(pixels.shape[-2]), index(pixels.shape[-1])))


def holds_timm(model: Any) -> bool:
    """True if ``model`` is a model of timm, or a module that holds one, and no model of transformers."""
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return False
    return any(is_timm(module) for module in model.modules())


def find_timm_encoder(model: nn.Module) -> TimmEncoder:
    """Find the vision transformer of timm in ``model`` by its structure.

    Raises:
        UnsupportedModelError: naming the class and what was looked for, if there is no vision transformer or several,
            if a block is not built as `Block` says with the parts in `TIMM_BLOCK`, or if it is inside a run already.
    """
    name = type(model).__name__
    bases: list[nn.Module] = []
    for module in model.modules():
        inside = any(module in set(outer.modules()) for outer in bases)
        if is_timm(module) and not inside and all(hasattr(module, part) for part in TIMM_BASE):
            bases.append(module)
    if len(bases) != 1:
        raise UnsupportedModelError(
            f"{name} holds {len(bases)} vision transformers of timm, exactly one was looked for, "
            f"with {', '.join(TIMM_BASE)}"
        )
    base: Any = bases[0]
    if RUN in vars(base):
        raise UnsupportedModelError(f"{name} is already inside a quickmerge run; leave that first")
    if not isinstance(base.blocks, nn.Sequential) or not has_timm_grid(base):
        raise UnsupportedModelError(
            f"{name} has blocks in a {type(base.blocks).__name__} and patches of a {type(base.patch_embed).__name__}; "
            "a Sequential was looked for, and patches with a dynamic_feat_size"
        )
    pooler = getattr(base, "attn_pool", None)
    return TimmEncoder(model, base, tuple(_timm_block(name, module) for module in base.blocks), pooler)


def _timm_block(name: str, module: nn.Module) -> Block:
    present = [part for part, _ in module.named_children() if part in TIMM_BLOCK]
    attention: Any = getattr(module, "attn", None)
    if tuple(present) != TIMM_BLOCK:
        raise UnsupportedModelError(
            f"{name} has a block {type(module).__name__} with {', '.join(present) or 'none'} of its parts, "
            f"{', '.join(TIMM_BLOCK)} were looked for, in this order"
        )
    missing = [part for part in TIMM_ATTENTION if not hasattr(attention, part)]
    if "attn_mask" not in inspect.signature(attention.forward).parameters:
        missing.append("attn_mask")
    if not missing and attention.qkv.out_features != 3 * attention.num_heads * attention.head_dim:
        missing.append("queries, keys and values of one width")
    if missing:
        raise UnsupportedModelError(
            f"{name} has attention {type(attention).__name__} without {', '.join(missing)}; softmax attention with "
            f"{', '.join(TIMM_ATTENTION)} that takes an attn_mask was looked for"
        )
    return Block(module, attention, module.norm2, module.mlp, adds_residual=False)  # type: ignore[arg-type]
