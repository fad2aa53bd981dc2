"""One way to load a vision model: an embedded name, a folder, or a hub id."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, get_args

from quickmerge.errors import QuickmergeError, near_match
from quickmerge.models.embedded import VISION_MODELS
from quickmerge.models.load import load_from
from quickmerge.models.read_vision import Task, read_vision

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor, PreTrainedModel

__all__ = ["VISION_MODELS", "load_vision"]


def load_vision(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
    task: Task = "features",
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a vision model and its image processor.

    Args:
        name_or_path: an embedded name (`"vit-small-14"`), a local model folder, or a hub id (`"owner/name"`).
        dtype: what the weights are held in, as `torch.bfloat16` or `"bfloat16"`.
        device: where the weights are held, as `"cpu"`, `"cuda"` or `"cuda:1"`.
        attn_implementation: `"sdpa"`, `"eager"` or another that transformers knows; None lets it choose.
        cache_dir: where embedded models are kept; None means `$QUICKMERGE_CACHE`, else the user's cache folder.
        progress: whether to show on stderr what goes on.
        task: `"features"` for the bare model, `"classify"` for one with its classification head. A bare model that
            was saved as a classifier comes without the pooler that it was saved without.

    Returns:
        The model in evaluation mode, and transformers' own image processor with its Pillow backend: called as
        `processor(images, return_tensors="pt")` on a list of Pillow images or of paths as text, it gives
        `pixel_values (B, 3, H, W)`, float32.

    Raises:
        UnknownModelError: there is no such model, or the hub cannot be reached.
        UnsupportedModelError: it does not take images alone, lacks an image processor, or lacks the head to classify.
        DamagedWeightsError: a weights file is truncated, garbled or incomplete.
        CacheFolderError: the cache folder cannot be written.
        FetchError: an embedded model could not be downloaded.
        QuickmergeError: `dtype`, `device`, `attn_implementation` or `task` is not one that can be used.
    """
    if task not in get_args(Task):
        tasks = get_args(Task)
        raise QuickmergeError(f"task is {task!r}{near_match(str(task), tasks)}, but must be one of: {', '.join(tasks)}")
    return load_from(
        name_or_path, VISION_MODELS, lambda source, options: read_vision(source, task, options), dtype=dtype,
        device=device, attn_implementation=attn_implementation, cache_dir=cache_dir, progress=progress,
    )  # fmt: skip
