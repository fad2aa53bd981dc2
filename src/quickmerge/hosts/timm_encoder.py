"""Finding the parts of a vision transformer of timm that the host acts on, or saying why it can't.

timm is never imported here: a model of it brings it along, and is known by where its class comes from.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from operator import index
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.hosts.encoder import Block, Encoder
from quickmerge.models.compat import TIMM_ATTENTION, TIMM_BASE, TIMM_BLOCK, has_timm_grid, is_timm, timm_grid

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
    return TimmEncoder(model, base, tuple(_block(name, module) for module in base.blocks), pooler)


def _block(name: str, module: nn.Module) -> Block:
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
