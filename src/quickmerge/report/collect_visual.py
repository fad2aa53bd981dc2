"""An image beside what became of its tokens in a vision-language model."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quickmerge.errors import QuickmergeError
from quickmerge.hosts import reduce
from quickmerge.models.vlm import ask_inputs
from quickmerge.reducers import Reducer
from quickmerge.report.collect_vision import as_picture, patch_ranks
from quickmerge.report.patchmap_stage import PatchStage
from quickmerge.training.data.labelled import PixelFormat


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
    with torch.inference_mode(), reduce(model, reducer, layer) as run:
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
        # Scaled to whole patches, and nothing cut off. How many pixels a patch has does not matter to a picture.
        scale = max(photo.width / grid[2], photo.height / grid[1], 8)
        return photo.resize((round(grid[2] * scale), round(grid[1] * scale)), Image.Resampling.BICUBIC)
    tile = pixels.flatten(0, -4)[-1]
    scaled = getattr(maker, "do_normalize", True)
    mean, std = (maker.image_mean, maker.image_std) if scaled else ((0.0,) * 3, (1.0,) * 3)
    return as_picture(tile, PixelFormat(tile.shape[-2], tile.shape[-1], tuple(mean), tuple(std)))


def _place(layer: Any) -> str:
    """Where a caption says that the tokens are, after the last of the layers."""
    depth = layer[-1] if isinstance(layer, (list, tuple)) else layer
    return f"in front of block {depth}" if depth else "in front of the language model"
