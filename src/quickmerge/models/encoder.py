"""Finding the parts of a vision transformer that the host acts on, or saying why it can't."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from itertools import pairwise
from operator import index
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import (
    TIMM_ATTENTION,
    TIMM_BASE,
    TIMM_BLOCK,
    attention_implementation,
    calls_attention,
    has_timm_grid,
    is_timm,
    timm_grid,
)
from quickmerge.models.decoder import IMPLEMENTATIONS, PREFIX
from quickmerge.models.encoder_inputs import flat_grid, is_visual, patch_of
from quickmerge.models.encoder_places import Layout
from quickmerge.models.encoder_probe import TraitError, probe
from quickmerge.models.encoder_tower import read_tower, towers, why_no_tower
from quickmerge.models.vision_families import VISION_FAMILIES as VISION_FAMILIES


@dataclass(frozen=True)
class Block:
    """A block of a vision transformer.

    Where its halves were found it is ``y = x + attention(norm(x))``, then ``y + feed_forward(second_norm(y))``;
    ``adds_residual`` says that ``feed_forward`` is a module that is given ``y`` and adds it itself. A block without
    them, ``second_norm`` None, is only known to make of each token, by its attention, another one.
    """

    module: nn.Module
    attention: nn.Module
    second_norm: nn.Module | None
    feed_forward: nn.Module | None
    adds_residual: bool
    layout: Layout | None = None


@dataclass(frozen=True)
class Encoder:
    """A vision transformer: the model as given, the encoder inside it, its blocks, and what pools its last tokens.

    ``whole`` says that what follows its last block needs every patch.
    """

    model: nn.Module
    base: nn.Module
    blocks: tuple[Block, ...]
    pooler: nn.Module | None
    whole: bool = False

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
        if pixels.ndim == 3:
            return 1, *flat_grid(self.config, index(pixels.shape[1]))
        tall, wide = index(pixels.shape[-2]), index(pixels.shape[-1])
        frames = index(pixels.shape[1]) if pixels.ndim == 5 else 1
        patch = patch_of(self.config, pixels.ndim == 5)
        if patch is None:
            raise UnsupportedModelError(f"{type(self.base).__name__} names no size of patches in its configuration")
        depth, height, width = patch
        return frames // depth, tall // height, wide // width


def find_encoder(model: PreTrainedModel) -> Encoder:
    """Find the vision transformer in ``model`` by its structure, and by trying it on a few patches.

    It is the innermost part of ``model`` that reads pixels and holds a list of blocks, each with one attention that
    goes through transformers' attention interface. What more has to hold `quickmerge.models.encoder_probe` tries, once
    for each model that is asked about.

    Raises:
        UnsupportedModelError: naming the class and the trait that can't be served, if there is no such vision
            transformer in it, or several, or the attention implementation is not one that the host can stand in front
            of.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(f"model must be a transformers PreTrainedModel, got {type(model).__name__}")
    name, found = type(model).__name__, towers(model)
    if len(found) > 1:
        held = ", ".join(type(tower).__name__ for tower in found)
        raise UnsupportedModelError(f"{name} holds {len(found)} vision transformers, {held}: give one of them")
    if not found:
        visual = [part for part in model.modules() if isinstance(part, PreTrainedModel) and is_visual(part)]
        if not visual:
            kind = model.config.model_type
            raise UnsupportedModelError(
                f"{name} (model_type {kind!r}) holds 0 vision transformers, exactly one was looked for: a part that "
                "reads pixels, with a list of blocks of attention"
            )
        _refuse(model, visual[0], why_no_tower(visual[0]))
    return _read(model, found[0])


def read_encoder(base: PreTrainedModel) -> Encoder:
    """The parts of a vision transformer that is known to be one: the tower of a vision-language model.

    Raises:
        UnsupportedModelError: see `find_encoder`.
    """
    return _read(base, base)


def _refuse(model: nn.Module, base: nn.Module, trait: str) -> NoReturn:
    kind = getattr(getattr(base, "config", None), "model_type", None)
    inside = "is" if base is model else f"holds a {type(base).__name__},"
    raise UnsupportedModelError(
        f"{type(model).__name__} (model_type {kind!r}) {inside} a vision model that can't be merged in because of its "
        f"{trait}; vision transformers are served whose patches are one plain sequence in every block, with attention "
        "through transformers' attention interface, and so are those of timm"
    )


def _read(model: PreTrainedModel, base: Any) -> Encoder:
    name = type(model).__name__
    implementation = attention_implementation(base.config)
    if implementation.startswith(PREFIX):
        raise UnsupportedModelError(f"{name} is already inside a quickmerge run; leave that first")
    if implementation not in IMPLEMENTATIONS:
        raise UnsupportedModelError(
            f"{name} runs attention as {implementation!r}, which merging can't stand in front of: "
            f"load it with attn_implementation set to one of {', '.join(IMPLEMENTATIONS)}"
        )
    try:
        tower = read_tower(base)
        if base not in _LAYOUTS:
            _LAYOUTS[base] = probe(base, tower.blocks)
    except TraitError as error:
        _refuse(model, base, str(error))
    blocks = tuple(_block(module, layout) for module, layout in zip(tower.blocks, _LAYOUTS[base], strict=True))
    # A first token that stands in front of the patches is the first one after any merging, too; a patch is not.
    whole = tower.whole or (tower.first and not _LAYOUTS[base][0].prefix)
    return Encoder(model, base, blocks, tower.pooler, whole)


_LAYOUTS: WeakKeyDictionary[nn.Module, tuple[Layout, ...]] = WeakKeyDictionary()
"""What was found of models that were tried."""


def _block(module: nn.Module, layout: Layout) -> Block:
    attention = next(each for each in module.modules() if calls_attention(each))
    norm, feed = (None if each is None else module.get_submodule(each) for each in (layout.norm, layout.feed))
    return Block(module, attention, norm, feed, layout.adds_residual, layout)


def holds_encoder(model: Any) -> bool:
    """True if ``model`` is a model of images or videos and no language model, or holds a vision transformer beside
    other parts. Whether that can be served `find_encoder` says."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is not None:
        return False
    return any(isinstance(part, PreTrainedModel) and is_visual(part) for part in model.modules())


PIXELS = ("pixel_values", "pixel_values_videos")
"""Names under which a vision transformer is given what it reads."""


def pixels_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The images or videos that a vision transformer of transformers was called with.

    Raises:
        ValueError: if there are none.
    """
    pixels = args[0] if args else next((kwargs[name] for name in PIXELS if name in kwargs), None)
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
