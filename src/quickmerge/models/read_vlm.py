"""Reading a vision-language model and its processor, and saying in one sentence what is wrong when they can't be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from quickmerge.errors import UnsupportedModelError
from quickmerge.models.compat import causal_lm_names, image_text_names, torchvision_available
from quickmerge.models.console import transformers_silenced
from quickmerge.models.read import damaged, first_sentence, read_config, read_weights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

__all__ = ["read_vlm"]


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
