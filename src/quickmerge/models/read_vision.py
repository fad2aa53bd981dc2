"""Reading a vision model and its image processor, and saying in one sentence what is wrong when they can't be read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from quickmerge.errors import QuickmergeError, UnsupportedModelError
from quickmerge.models.compat import bare_model_class, image_classification_names
from quickmerge.models.console import transformers_silenced
from quickmerge.models.read import damaged, first_sentence, read_config, read_weights

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PretrainedConfig, PreTrainedModel

__all__ = ["Task", "read_vision"]

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
        processor = _read_processor(source)
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


def _read_processor(source: str) -> BaseImageProcessor:
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
