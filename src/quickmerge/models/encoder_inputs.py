"""Small inputs that a vision transformer can read, made from its configuration and the arguments of its forward."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

PIXELS = "pixel_values"
"""How the first argument of what reads images begins, ``pixel_values`` or ``pixel_values_videos``."""


def named_arguments(module: nn.Module) -> list[inspect.Parameter]:
    """The arguments of a module's ``forward`` without ``self`` and what gathers others, in order."""
    gathers = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [p for p in inspect.signature(module.forward).parameters.values() if p.kind not in gathers]


PACKED = "patches of all images in one packed sequence"
"""What can't be served of models that `packs` tells."""


def packs(names: Iterable[str]) -> bool:
    """Whether arguments of a forward are such as tell images apart in a packed sequence."""
    return any("grid" in name or "cu_seqlens" in name or name.endswith("_sizes") for name in names)


def is_visual(module: nn.Module) -> bool:
    """Whether a module reads images or videos alone, as pixels or as patches in a packed sequence."""
    names = [p.name for p in named_arguments(module)]
    return reads_pixels(module) or (names[:1] == ["hidden_states"] and packs(names))


def reads_pixels(module: nn.Module) -> bool:
    """Whether the first argument of a module's ``forward`` is a batch of images or videos."""
    given = named_arguments(module)
    return bool(given) and given[0].name.startswith(PIXELS)


def patch_of(config: Any, video: bool) -> tuple[int, int, int] | None:
    """Frames, height and width of a patch; None where the configuration names no size of patches."""
    own = getattr(config, "patch_size", None)
    tube = getattr(config, "tubelet_size", None)
    if isinstance(tube, (list, tuple)):
        deep, high, wide = (1, *tube)[-3:]
        return index(deep), index(high), index(wide)
    if own is None:
        return None
    high, wide = (own, own) if isinstance(own, int) else tuple(own)[-2:]
    return (index(tube) if video and tube is not None else 1), index(high), index(wide)


def flat_grid(config: Any, count: int) -> tuple[int, int]:
    """Rows and columns of ``count`` patches that are cut already, where nothing tells more than the configuration: as
    many of each where that is the size of its images, else one line."""
    side = math.isqrt(count)
    own, patch = getattr(config, "image_size", None), patch_of(config, False)
    square = own is not None and patch is not None and _pair(own) == (side * patch[1], side * patch[2])
    return (side, side) if square and side * side == count else (1, count)


def frames_of(config: Any) -> int | None:
    """How many frames a video has; None where the configuration names no number."""
    found = getattr(config, "num_frames", None) or getattr(config, "frames_per_clip", None)
    return None if found is None else index(found)


@dataclass(frozen=True)
class Example:
    """A batch of inputs and the patches that each image of it is cut into, ``(T, H, W)``."""

    inputs: dict[str, Any]
    grid: tuple[int, int, int]

    @property
    def pixels(self) -> Tensor:
        """The images, videos or patches."""
        return next(iter(self.inputs.values()))  # type: ignore[no-any-return]


def examples(base: Any, rows: int, *, seed: int = 0, size: int | tuple[int, int] | None = None) -> Iterator[Example]:
    """Batches of random inputs that ``base`` may be able to read, the smallest first.

    Not every model reads images of any size, and some read patches that are cut already ``(B, N, C P P)``: what
    raises leaves the next one to be tried.

    Args:
        base: a vision model with a configuration, whose forward takes pixels first.
        rows: batch size.
        seed: of the values.
        size: height and width in pixels. Default: 3 by 4 patches, and then the size that the configuration names.
    """
    config, names = base.config, [p.name for p in named_arguments(base)]
    video = names[0].endswith("videos") or (hasattr(config, "tubelet_size") and frames_of(config) is not None)
    patch = patch_of(config, video)
    if patch is None:
        return
    channels = getattr(config, "num_channels", None) or getattr(config, "in_channels", None) or 3
    frames = (frames_of(config) or patch[0]) if video else 1
    own = getattr(config, "image_size", None) or getattr(config, "crop_size", None)
    sizes = [_pair(size)] if size is not None else [(3 * patch[1], 4 * patch[2])]
    if own is not None and size is None:
        sizes.append(_pair(own))
    for flat in (False, True):
        for high, wide in sizes:
            grid = (frames // patch[0], high // patch[1], wide // patch[2])
            shape: tuple[int, ...] = (rows, *([frames] if video else []), channels, high, wide)
            if flat or "spatial_shapes" in names:
                shape = (rows, grid[0] * grid[1] * grid[2], channels * patch[1] * patch[2])
            if min(grid) > 0:
                yield Example(_inputs(base, names, shape, grid, seed), grid)


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, dict):
        return index(size["height"]), index(size["width"])
    return (index(size), index(size)) if isinstance(size, int) else (index(size[-2]), index(size[-1]))


def _inputs(
    base: Any, names: list[str], shape: tuple[int, ...], grid: tuple[int, int, int], seed: int
) -> dict[str, Any]:
    weight = next(p for p in base.parameters() if p.is_floating_point())
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    inputs: dict[str, Any] = {names[0]: values.to(weight.device, weight.dtype)}
    rows, count = shape[0], grid[0] * grid[1] * grid[2]
    if "pixel_attention_mask" in names and "spatial_shapes" in names:
        inputs["pixel_attention_mask"] = torch.ones(rows, count, dtype=torch.long, device=weight.device)
    if "spatial_shapes" in names:
        inputs["spatial_shapes"] = torch.tensor([grid[1:]] * rows, device=weight.device)
    if "target_sizes" in names:
        inputs["target_sizes"] = torch.tensor([grid[1:]] * rows, device=weight.device)
    if "noise" in names:
        inputs["noise"] = torch.arange(count, device=weight.device).expand(rows, -1).to(weight.dtype) / count
    return inputs
