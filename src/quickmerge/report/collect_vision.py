"""Patches of an image or a video beside what became of them, block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from quickmerge.hosts import reduce
from quickmerge.hosts.frames import encode_frames
from quickmerge.hosts.summary import VisionStats
from quickmerge.reducers import Reducer
from quickmerge.report.patchmap_stage import PatchStage
from quickmerge.training.data.labelled import PixelFormat


def patch_stages(
    model: Any, pixels: Tensor, reducer: Reducer, layer: Any = None
) -> tuple[list[PatchStage], VisionStats]:
    """Run one image ``(1, C, H, W)`` or video ``(1, T, C, H, W)`` through a reducer; the groups after every block.

    Blocks are counted from 1, as in captions. Those that leave the tokens as they got them are left out.
    """
    with torch.inference_mode(), reduce(model, reducer, layer) as run:
        model(pixels)
    call, stages, before = run.call, [], run.call.tokens
    for block in range(len(call.widths)):
        level = call.levels[block + 1]
        if level is None or level.size.shape[1] == before:
            continue
        before = level.size.shape[1]
        slot = level.slot[0, call.prefix :].reshape(call.grid)
        plan = call.plans[block]
        ranks = None if plan is None or plan.order is None else patch_ranks(plan.slot[0], plan.order[0], slot)
        stages.append(PatchStage(f"block {block + 1}", slot.cpu().numpy(), call.prefix, ranks))
    return stages, run.summary()


def patch_ranks(slot: Tensor, order: Tensor, groups: Tensor) -> NDArray[np.int64]:
    """When the slot of each patch was chosen, from 1 on; 0 for patches that were dropped, or kept without a turn.

    Args:
        slot: ``(N,)``, where a plan puts each token.
        order: ``(K,)``, the tokens that the plan chose one after another, then -1.
        groups: the slot that each patch is in, of any shape; -1 for dropped.

    Returns:
        The shape of ``groups``.
    """
    chosen = slot[order[order >= 0]]
    turn = slot.new_zeros(int(slot.max()) + 2)  # the last stands for -1, which chose nobody
    turn[chosen] = torch.arange(1, len(chosen) + 1, device=slot.device)
    ranks: NDArray[np.int64] = turn[groups].cpu().numpy()
    return ranks


def frame_stage(model: Any, pixels: Tensor, across: Reducer) -> PatchStage:
    """The groups of the patches of a video ``(1, T, C, H, W)``, each frame encoded alone and merged across time."""
    with torch.inference_mode():
        tokens = encode_frames(model, pixels, across)
    return PatchStage("merged across time", tokens.slot[0].reshape(tokens.grid).cpu().numpy())


def as_picture(pixels: Tensor, form: PixelFormat) -> Image.Image:
    """What a model saw of an image ``(3, H, W)``, put back into colours."""
    x = form.plain(pixels.float().cpu())
    return Image.fromarray((x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
