"""Reading a vision model and its image processor, and saying in one sentence what is wrong when they can't be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from quickmerge.errors import QuickmergeError, UnsupportedModelError, check_string, near_match
from quickmerge.models.chat import apply_chat_template
from quickmerge.models.compat import (
    bare_model_class,
    causal_lm_names,
    image_classification_names,
    image_text_names,
    torchvision_available,
)
from quickmerge.models.embedded import MODELS, VISION_MODELS
from quickmerge.models.load import load_from
from quickmerge.models.read import damaged, first_sentence, read_config, read_weights, transformers_silenced

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from transformers import BaseImageProcessor, BatchFeature, PretrainedConfig, PreTrainedModel, ProcessorMixin

__all__ = ["VISION_MODELS", "Task", "ask_inputs", "load_vision", "load_vlm", "read_vision", "read_vlm"]


Task: TypeAlias = Literal["features", "classify"]


def read_vision(source: str, task: Task, options: dict[str, Any]) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Read the vision model and the image processor that lie in a folder or on the hub.

    Args:
        source: a folder, or a hub id.
        task: `"features"` for the bare model, `"classify"` for one with its classification head.
        options: what goes to `from_pretrained` of the model.

    Raises:
        UnknownModelError: nothing of this name can be reached.
        UnsupportedModelError: it is not a vision model, has no classification head, or lacks an image processor.
        DamagedWeightsError: the weights are garbled or incomplete.
    """
    with transformers_silenced():
        config = read_config(source)
        _check_images_alone(source, config)
        if task == "classify":
            _check_head(source, config)
        # the processor first: it is small, and its absence should not cost the wait for the weights
        processor = _read_image_processor(source)
        model = _read_features(source, config, options) if task == "features" else _read_head(source, config, options)
    return model, processor


def _check_images_alone(source: str, config: PretrainedConfig) -> None:
    bare = bare_model_class(config)
    if bare is not None and bare.input_modalities in ("image", ("image",)) and bare.main_input_name == "pixel_values":
        return
    raise UnsupportedModelError(
        f"{source} is not a vision model ({_kind(config)}): give one that takes images alone, as ViT or DINOv2"
    )


def _check_head(source: str, config: PretrainedConfig) -> None:
    known = image_classification_names().get(config.model_type, ())
    heads = {known} if isinstance(known, str) else set(known)
    # saved without a head, the model could be opened all the same, with a head of random numbers
    if not heads & set(config.architectures or heads):
        raise UnsupportedModelError(
            f"{source} has no classification head ({_kind(config)}): "
            "give task='features', or a model that was trained to classify images"
        )


def _read_image_processor(source: str) -> BaseImageProcessor:
    from transformers import AutoImageProcessor

    try:
        # Pillow's backend, also where torchvision is installed: the two scale images differently, and a number
        # should not depend on what else is there
        return AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise UnsupportedModelError(f"{source} has no usable image processor ({first_sentence(error)})") from error


def _read_features(source: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModel

    model, lacking = read_weights(AutoModel, source, config, options)
    if lacking and all(name.startswith("pooler.") for name in lacking):
        # A classifier was saved without the pooler that some bare models have. Random numbers are no substitute.
        model, lacking = _without_pooler(source, config, options)
    return _whole(source, model, lacking)


def _without_pooler(
    source: str, config: PretrainedConfig, options: dict[str, Any]
) -> tuple[PreTrainedModel, list[str]]:
    from transformers import AutoModel

    try:
        return read_weights(AutoModel, source, config, {**options, "add_pooling_layer": False})
    except QuickmergeError as error:
        if not isinstance(error.__cause__, TypeError):
            raise
        # this model has no such choice
        raise QuickmergeError(f"{source} was saved without its pooler, which its model needs") from error


def _read_head(source: str, config: PretrainedConfig, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForImageClassification

    return _whole(source, *read_weights(AutoModelForImageClassification, source, config, options))


def _whole(source: str, model: PreTrainedModel, lacking: list[str]) -> PreTrainedModel:
    if lacking:
        raise damaged(source, f"{len(lacking)} tensors are missing, {lacking[0]} first")
    return model


def _kind(config: PretrainedConfig) -> str:
    return config.architectures[0] if config.architectures else f"model type {config.model_type!r}"


# Reading a vision-language model and its processor, and saying in one sentence what is wrong when they can't be.


def read_vlm(source: str, options: dict[str, Any]) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Read the vision-language model and the processor that lie in a folder or on the hub.

    Args:
        source: a folder, or a hub id.
        options: what goes to `from_pretrained` of the model.

    Raises:
        UnknownModelError: nothing of this name can be reached.
        UnsupportedModelError: it is not a vision-language model, or lacks a processor that can be used here.
        DamagedWeightsError: the weights are garbled or incomplete.
    """
    from transformers import AutoModelForImageTextToText

    with transformers_silenced():
        config = read_config(source)
        _check_both(source, config)
        # the processor first: it is small, and its absence should not cost the wait for the weights
        processor = _read_processor(source)
        model, lacking = read_weights(AutoModelForImageTextToText, source, config, options)
    if lacking:
        raise damaged(source, f"{len(lacking)} tensors are missing, {lacking[0]} first")
    return model, processor


def _check_both(source: str, config: PretrainedConfig) -> None:
    known = image_text_names().get(config.model_type)
    saved = set(config.architectures or [])
    if known is not None and (not saved or saved & set(image_text_names().values())):
        return
    kind = config.architectures[0] if config.architectures else f"model type {config.model_type!r}"
    text = known is None and config.model_type in causal_lm_names()
    raise UnsupportedModelError(
        f"{source} {'reads text alone' if text else 'is not a vision-language model'} ({kind}): "
        "give one that reads images and text and writes text, as LLaVA or Qwen2-VL"
    )


def _read_processor(source: str) -> ProcessorMixin:
    from transformers import AutoImageProcessor, AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        # Pillow's backend, also where torchvision is installed: see read_vision. Asked of the whole processor, it is
        # asked of a video processor too, and no video processor has it.
        if getattr(processor, "image_processor", None) is not None:
            processor.image_processor = AutoImageProcessor.from_pretrained(
                source, backend="pil", trust_remote_code=False
            )
    except Exception as error:  # transformers raises whatever its parsers raise
        if not torchvision_available() and "video" in str(error).lower():
            raise UnsupportedModelError(
                f"the processor of {source} prepares video too, which needs torchvision: install torchvision"
            ) from error
        raise UnsupportedModelError(f"{source} has no usable processor ({first_sentence(error)})") from error
    # where a folder has no processor, transformers gives the tokenizer or the image processor that it finds
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise UnsupportedModelError(
            f"{source} has no processor for images and text, only a {type(processor).__name__}: "
            "copy the files that its processor was saved with"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:  # older folders keep it with the processor alone
        tokenizer.chat_template = processor.chat_template
    return processor


# One way to load a vision model: an embedded name, a folder, or a hub id.


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
        device=device, attn_implementation=attn_implementation, cache_dir=cache_dir, progress=progress, writes=False,
    )  # fmt: skip


# One way to load a vision-language model, and to ask it about images.


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
        dtype: what the weights are held in, as `torch.bfloat16` or `"bfloat16"`; or `"auto"` or `"int8"`, as for
            `quickmerge.load`.
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
    check_string("question", question)
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
