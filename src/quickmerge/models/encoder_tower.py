"""Where a vision transformer keeps its blocks, and which of its traits stand in the way where it keeps none."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from quickmerge.models.compat import calls_attention, gives_feature_maps
from quickmerge.models.encoder_inputs import PACKED, named_arguments, packs, reads_pixels
from quickmerge.models.encoder_probe import TraitError

POOLERS = ("pooler", "head")
"""Names of the parts that pool the last tokens to one vector."""

GIVEN = ("pixel_attention_mask", "spatial_shapes")
"""What a forward may ask for beside pixels: which patches are there, and how many each image has."""


@dataclass(frozen=True)
class Tower:
    """The blocks of a vision transformer, and what reads the tokens behind them.

    ``pooler`` is what pools them to a vector, ``whole`` says that there are parts that read patches together, and
    ``first`` that its own forward makes something of the first token.
    """

    blocks: tuple[nn.Module, ...]
    pooler: nn.Module | None
    whole: bool
    first: bool


def towers(model: nn.Module) -> list[PreTrainedModel]:
    """The innermost models in ``model`` that read pixels and hold a list of blocks with attention."""
    found = [
        module for module in model.modules()
        if isinstance(module, PreTrainedModel) and reads_pixels(module) and stacks(module)
    ]  # fmt: skip
    inner = [module for module in found if not any(other is not module and other in set(module.modules())
                                                   for other in found)]  # fmt: skip
    return inner


def stacks(base: nn.Module) -> list[tuple[str, nn.ModuleList]]:
    """The outermost lists of modules that hold one attention of transformers' interface each or more, by name."""
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or any(name.startswith(outer + ".") for outer, _ in found):
            continue
        if len(module) and all(any(calls_attention(part) for part in block.modules()) for block in module):
            found.append((name, module))
    return found


def read_tower(base: PreTrainedModel) -> Tower:
    """The parts of a vision transformer that hold and follow its blocks.

    Raises:
        TraitError: if something about them can't be served.
    """
    if gives_feature_maps(base):
        raise TraitError(
            "feature maps, which a backbone makes of all patches of several blocks (its plain model can be merged in)"
        )
    labels = [p.name for p in named_arguments(base) if p.name.endswith("labels")]
    if labels:
        raise TraitError(f"head in the very model that holds the blocks (its forward takes {', '.join(labels)})")
    if any(value for name, value in vars(base.config).items() if "deepstack" in name):
        raise TraitError("parts that read the tokens of several blocks (DeepStack)")
    asked = [p.name for p in named_arguments(base)[1:] if p.default is p.empty and p.name not in GIVEN]
    if asked:
        what = PACKED if packs(asked) else "inputs beside pixels"
        raise TraitError(f"{what} (its forward asks for {', '.join(asked)})")
    found = stacks(base)
    if not found:
        raise TraitError(why_no_tower(base))
    name, blocks = found[0]
    if any(stacks(block) for block in blocks):
        raise TraitError("stages of blocks with pooling between them")
    windows = sorted({size for block in blocks if (size := _window(block))})
    if windows:
        raise TraitError(f"window attention on a grid (windows of {', '.join(map(str, windows))} patches)")
    pooler, rest = _behind(base, name)
    return Tower(tuple(blocks), pooler, rest or _takes_a_mean(base), pooler is None and _gives_pooled(base))


def _window(block: nn.Module) -> int:
    """The size of the windows that something in a block looks at; 0 for none."""
    sizes = [getattr(module, "window_size", 0) for module in block.modules()]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def _behind(base: nn.Module, stack: str) -> tuple[nn.Module | None, bool]:
    """What pools the tokens behind the blocks called ``stack``, and whether more follows that reads them together."""
    holder: nn.Module = base
    pooler: nn.Module | None = None
    rest = False
    for part in stack.split("."):
        names = [name for name, _ in holder.named_children()]
        for name in names[names.index(part) + 1 :]:
            module = holder.get_submodule(name)
            if name in POOLERS:
                pooler = module
            else:
                rest = rest or not _tells_tokens_apart(module)
        holder = holder.get_submodule(part)
    if pooler is None:
        named = [getattr(base, name, None) for name in POOLERS]
        pooler = next((module for module in named if isinstance(module, nn.Module)), None)
    return pooler, rest


def _takes_a_mean(base: nn.Module) -> bool:
    """Whether the forward of a model itself takes a mean of something."""
    return "mean" in inspect.unwrap(type(base).forward).__code__.co_names


def _gives_pooled(base: nn.Module) -> bool:
    """Whether the forward of a model itself names a pooled output."""
    constants = inspect.unwrap(type(base).forward).__code__.co_consts
    return any(isinstance(names, tuple) and "pooler_output" in names for names in constants)


def _tells_tokens_apart(module: nn.Module) -> bool:
    """Whether a module does the same to each token, or nothing: a norm, dropout, or what has no weights of its own."""
    weights: list[Tensor] = list(module.parameters())
    return all(weight.ndim <= 1 for weight in weights)


# What is told of models that hold no such blocks.


def why_no_tower(model: nn.Module) -> str:
    """The traits of a vision model because of which no list of blocks was found in it, in words."""
    parts = list(model.modules())
    told = []
    names = [p.name for p in named_arguments(model)]
    if packs(names):
        told.append(f"{PACKED} (its forward takes {', '.join(name for name in names if packs([name]))})")
    own = [part for part in parts if "attention" in type(part).__name__.lower() and not calls_attention(part)]
    own = [part for part in own if any(isinstance(inner, nn.Linear) for inner in part.modules())]
    if any(_window(part) for part in parts):
        told.append("window attention on a grid")
    names = [name for name, _ in model.named_parameters()]
    if any("rel_pos_" in name or "relative_position_bias_table" in name for name in names):
        told.append("relative position bias table")
    config: Any = getattr(model, "config", None)
    lists = [part for part in parts if isinstance(part, nn.ModuleList) and len(part)]
    depths = getattr(config, "depths", None) or ()
    if len(depths) > 1 or any("stage" in type(part[0]).__name__.lower() for part in lists):
        told.append("pooling between stages of blocks")
    if own:
        told.append(
            f"attention of its own ({type(own[-1]).__name__}), which does not go through transformers' interface"
        )
    elif not any(calls_attention(part) for part in parts):
        told.append("blocks without attention")
    elif not told:
        told.append("blocks of which some have no attention")
    return ", ".join(told)
