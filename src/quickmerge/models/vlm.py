"""One way to load a vision-language model, and to ask it about images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quickmerge.errors import QuickmergeError, UnsupportedModelError, check_text
from quickmerge.models.embedded import MODELS, VISION_MODELS
from quickmerge.models.load import load_from
from quickmerge.models.read_vlm import read_vlm
from quickmerge.models.template import apply_chat_template

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

__all__ = ["ask_inputs", "load_vlm"]


def load_vlm(
    name_or_path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    progress: bool = True,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a vision-language model, which reads images and text and writes text, and its processor.

    Args:
        name_or_path: a local model folder, as `quickmerge train vlm` writes it, or a hub id (`"owner/name"`).
        dtype: what the weights are held in, as `torch.bfloat16` or `"bfloat16"`.
        device: where the weights are held, as `"cpu"`, `"cuda"` or `"cuda:1"`.
        attn_implementation: `"sdpa"`, `"eager"` or another that transformers knows; None lets it choose.
        progress: whether to show on stderr what goes on.

    Returns:
        The model in evaluation mode, and transformers' own processor, which prepares images with Pillow and pads
        text on the left.

    Raises:
        UnknownModelError: there is no such model, or the hub cannot be reached.
        UnsupportedModelError: it does not read both images and text, or its processor is missing or cannot be used.
        DamagedWeightsError: a weights file is truncated, garbled or incomplete.
        QuickmergeError: `dtype`, `device` or `attn_implementation` is not one that can be used.
    """
    name = os.fspath(name_or_path)
    for embedded, kind, opener in ((MODELS, "language", "load"), (VISION_MODELS, "vision", "load_vision")):
        if name in embedded:
            raise UnsupportedModelError(
                f"{name} is a {kind} model, not a vision-language model: open it with {opener}, "
                "or make one of both kinds with quickmerge train vlm"
            )
    return load_from(
        name, {}, read_vlm, dtype=dtype, device=device, attn_implementation=attn_implementation, cache_dir=None,
        progress=progress,
    )  # fmt: skip


def question_on(images: Sequence[Any], question: str) -> list[dict[str, Any]]:
    """The conversation that asks something about images, which come first."""
    parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def ask_inputs(processor: ProcessorMixin, images: Sequence[Image.Image], question: str) -> BatchFeature:
    """A question about some images as its model's chat template puts it, the images first, ready for `generate`.

    Args:
        processor: of `load_vlm`.
        images: of any mode of Pillow; each is turned upright, scaled to 8 bits a channel, and white where it is
            transparent, as files are.
        question: text that does not hold the token that stands for an image.

    Returns:
        ``input_ids (1, N)``, ``attention_mask (1, N)``, ``pixel_values`` and whatever else the model takes.

    Raises:
        QuickmergeError: the question is empty or holds the token that stands for an image, an image can't be read,
            or the processor has no chat template.
    """
    from quickmerge.images import upright

    token = getattr(processor, "image_token", None)
    check_text("question", question)
    if not question.strip():
        raise QuickmergeError("question must hold some text, got none")
    if token and str(token) in question:
        raise QuickmergeError(f"question must not hold {token}, which stands for an image, got {question!r}")
    if getattr(processor, "chat_template", None) is None:
        raise QuickmergeError(f"the {type(processor).__name__} has no chat template that says how a question is put")
    shown = [upright(image, f"images[{index}]") for index, image in enumerate(images)]
    inputs: BatchFeature = apply_chat_template(
        processor, question_on(shown, question), add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    return inputs
