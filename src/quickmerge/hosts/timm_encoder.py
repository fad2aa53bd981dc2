"""Finding the parts of a vision transformer of timm that the host acts on, or saying why it can't.

timm is never imported here: a model of it brings it along, and is known by where its class comes from.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.errors import UnsupportedModelError
from quickmerge.hosts.encoder import Block, Encoder

LIBRARY = "timm.models"
RUN = "quickmerge_run"
"""Name under which a model holds the run that it is inside of."""

BASE_PARTS = ("patch_embed", "blocks", "norm", "num_prefix_tokens")
BLOCK_PARTS = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
"""Of a block, in the order in which they are computed; a block that norms what it adds names them in another one."""
ATTENTION_PARTS = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "head_dim", "scale")


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
        height, width = self.base.patch_embed.dynamic_feat_size(pixels.shape[-2:])  # type: ignore[union-attr,operator]
        return 1, int(height), int(width)


def holds_timm(model: Any) -> bool:
    """True if ``model`` is a model of timm, or a module that holds one, and no model of transformers."""
    if not isinstance(model, nn.Module) or isinstance(model, PreTrainedModel):
        return False
    return any(_is_timm(module) for module in model.modules())


def find_timm_encoder(model: nn.Module) -> TimmEncoder:
    """Find the vision transformer of timm in ``model`` by its structure.

    Raises:
        UnsupportedModelError: naming the class and what was looked for, if there is no vision transformer or several,
            if a block is not built as `Block` says with the parts in `BLOCK_PARTS`, or if it is inside a run already.
    """
    name = type(model).__name__
    bases: list[nn.Module] = []
    for module in model.modules():
        inside = any(module in set(outer.modules()) for outer in bases)
        if _is_timm(module) and not inside and all(hasattr(module, part) for part in BASE_PARTS):
            bases.append(module)
    if len(bases) != 1:
        raise UnsupportedModelError(
            f"{name} holds {len(bases)} vision transformers of timm, exactly one was looked for, "
            f"with {', '.join(BASE_PARTS)}"
        )
    base: Any = bases[0]
    if RUN in vars(base):
        raise UnsupportedModelError(f"{name} is already inside a quickmerge run; leave that first")
    if not isinstance(base.blocks, nn.Sequential) or not hasattr(base.patch_embed, "dynamic_feat_size"):
        raise UnsupportedModelError(
            f"{name} has blocks in a {type(base.blocks).__name__} and patches of a {type(base.patch_embed).__name__}; "
            "a Sequential was looked for, and patches with a dynamic_feat_size"
        )
    pooler = getattr(base, "attn_pool", None)
    return TimmEncoder(model, base, tuple(_block(name, module) for module in base.blocks), pooler)


def _is_timm(module: nn.Module) -> bool:
    return any(each.__module__.startswith(LIBRARY) for each in type(module).__mro__)


def _block(name: str, module: nn.Module) -> Block:
    present = [part for part, _ in module.named_children() if part in BLOCK_PARTS]
    attention: Any = getattr(module, "attn", None)
    if tuple(present) != BLOCK_PARTS:
        raise UnsupportedModelError(
            f"{name} has a block {type(module).__name__} with {', '.join(present) or 'none'} of its parts, "
            f"{', '.join(BLOCK_PARTS)} were looked for, in this order"
        )
    missing = [part for part in ATTENTION_PARTS if not hasattr(attention, part)]
    if "attn_mask" not in inspect.signature(attention.forward).parameters:
        missing.append("attn_mask")
    if not missing and attention.qkv.out_features != 3 * attention.num_heads * attention.head_dim:
        missing.append("queries, keys and values of one width")
    if missing:
        raise UnsupportedModelError(
            f"{name} has attention {type(attention).__name__} without {', '.join(missing)}; softmax attention with "
            f"{', '.join(ATTENTION_PARTS)} that takes an attn_mask was looked for"
        )
    return Block(module, attention, module.norm2, module.mlp, adds_residual=False)  # type: ignore[arg-type]
