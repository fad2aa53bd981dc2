"""The tokens of a text beside what became of them."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from quickmerge.bench.quality import first_tokens
from quickmerge.datasets.labelled import PixelFormat
from quickmerge.errors import QuickmergeError
from quickmerge.merge.attach import reduce
from quickmerge.merge.reducers import Reducer
from quickmerge.merge.run import RunStats, VisionStats
from quickmerge.merge.text.modes import Prefix, Protect
from quickmerge.merge.tokens.plan import MergePlan
from quickmerge.merge.vision.vit import VisionRun, encode_frames
from quickmerge.merge.visual.vlm import VlmRun
from quickmerge.models.load_vision import ask_inputs
from quickmerge.viz.patchmap import PatchStage
from quickmerge.viz.tokenmap import TokenCell


def token_texts(tokenizer: Any, ids: list[int]) -> list[str]:
    """The text of each token; bytes that are no character on their own show as a replacement sign."""
    return [tokenizer.decode([i]) for i in ids]


def plan_cells(tokenizer: Any, ids: Tensor, plan: MergePlan, protected: Tensor | None = None) -> list[TokenCell]:
    """One cell per token of a one-row plan; ``ids (N,)``.

    The anchor of a slot is the member that stands at the slot's position.
    """
    texts = token_texts(tokenizer, ids.tolist())
    slot, weight, place = plan.slot[0].tolist(), plan.weight[0].tolist(), plan.position[0].tolist()
    shut = [False] * len(texts) if protected is None else protected[0].tolist()
    return [
        TokenCell(
            text=text,
            slot=s,
            weight=w if s >= 0 else 0.0,
            anchor=s >= 0 and place[s] == i,
            protected=bool(p),
            saliency=None,
            position=i,
        )
        for i, (text, s, w, p) in enumerate(zip(texts, slot, weight, shut, strict=True))
    ]


def token_cells(
    model: Any,
    tokenizer: Any,
    text: str,
    reducer: Reducer,
    layer: Any = None,
    *,
    limit: int = 2048,
    min_tokens: int = 0,
    protect: Protect = None,
) -> tuple[list[TokenCell], RunStats]:
    """Read the first ``limit`` tokens of a text through a reducer; its tokens as cells and the run's statistics.

    Of fewer than ``min_tokens`` tokens none are reduced, nor where all are protected; ``protect`` is that of `Prefix`.
        QuickmergeError: the text has no tokens.
    """
    ids = torch.tensor([first_tokens(tokenizer, text, limit)], device=model.device)
    mode = Prefix(min_tokens=min_tokens, protect=protect)
    with torch.inference_mode(), reduce(model, reducer, layer, mode=mode) as run:
        model(ids, use_cache=False, logits_to_keep=1)
    plan, protected = run.main_plan, run.protected
    return plan_cells(tokenizer, ids[0], plan, protected), run.summary()


# Patches of an image or a video beside what became of them, block by block.


def patch_stages(
    model: Any, pixels: Tensor, reducer: Reducer, layer: Any = None
) -> tuple[list[PatchStage], VisionStats]:
    """Run one image ``(1, C, H, W)`` or video ``(1, T, C, H, W)`` through a reducer; the groups after every block.

    Blocks are counted from 1, as in captions. Those that leave the tokens as they got them are left out.
    """
    with torch.inference_mode(), cast(VisionRun, reduce(model, reducer, layer)) as run:
        model(pixels)
    call = run.call
    assert call is not None  # the model has just run
    stages, before = [], call.tokens
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


def as_image(pixels: Tensor, form: PixelFormat) -> Image.Image:
    """What a model saw of an image ``(3, H, W)``, put back into colours."""
    x = form.plain(pixels.float().cpu())
    return Image.fromarray((x.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())


# An image beside what became of its tokens in a vision-language model.


def visual_stage(
    model: Any, processor: Any, photo: Image.Image, prompt: str, reducer: Reducer, layer: Any = None
) -> tuple[Image.Image, PatchStage | None, Any]:
    """Ask about an image through a reducer.

    Of a model that cuts an image into tiles, the last one is shown, which is the image as a whole.

    Returns:
        The image as the model saw it, the tokens that were left (None if all were), and the run's statistics.

    Raises:
        QuickmergeError: the image's tokens form no grid, as those of several crops put together.
    """
    inputs = ask_inputs(processor, [photo], prompt).to(model.device, model.dtype)
    with torch.inference_mode(), cast(VlmRun, reduce(model, reducer, layer)) as run:
        model(**inputs)
    last = run.images[-1]
    if last.grid is None:
        raise QuickmergeError(
            f"the tokens of this image form no grid to draw in {type(model).__name__}, which cuts it into crops: "
            "give an image of the size that the model reads whole"
        )
    seen = seen_by(processor, inputs["pixel_values"], photo, last.grid)
    if last.plan is None or last.left == last.count:
        return seen, None, run.summary()
    slot, order = last.plan.slot[0], last.plan.order
    groups = slot.reshape(last.grid)
    ranks = None if order is None else patch_ranks(slot, order[0], groups)
    return seen, PatchStage(_place(layer), groups.cpu().numpy(), ranks=ranks), run.summary()


def seen_by(processor: Any, pixels: Tensor, photo: Image.Image, grid: tuple[int, int, int]) -> Image.Image:
    """What a model saw of ``photo``: its last tile, or the whole where patches of ``grid`` are listed one by one."""
    maker = processor.image_processor
    if pixels.ndim < 4:
        # Scaled to whole patches, and nothing cut off. How many pixels a patch has does not matter to an image.
        scale = max(photo.width / grid[2], photo.height / grid[1], 8)
        return photo.resize((round(grid[2] * scale), round(grid[1] * scale)), Image.Resampling.BICUBIC)
    tile = pixels.flatten(0, -4)[-1]
    scaled = getattr(maker, "do_normalize", True)
    mean, std = (maker.image_mean, maker.image_std) if scaled else ((0.0,) * 3, (1.0,) * 3)
    return as_image(tile, PixelFormat(tile.shape[-2], tile.shape[-1], tuple(mean), tuple(std)))


def _place(layer: Any) -> str:
    """Where a caption says that the tokens are, after the last of the layers."""
    depth = layer[-1] if isinstance(layer, (list, tuple)) else layer
    return f"in front of block {depth}" if depth else "in front of the language model"
