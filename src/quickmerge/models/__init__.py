"""Loading: any Hugging Face language, vision or vision-language model, and embedded defaults that need no hub."""

from quickmerge.errors import (
    CacheFolderError,
    DamagedWeightsError,
    FetchError,
    UnknownModelError,
    UnsupportedModelError,
)
from quickmerge.models.download import cache_folder
from quickmerge.models.load import MODELS, find_model, load, load_shape_only, verify
from quickmerge.models.load_vision import VISION_MODELS, ask_inputs, load_vision, load_vlm

__all__ = [
    "MODELS",
    "VISION_MODELS",
    "CacheFolderError",
    "DamagedWeightsError",
    "FetchError",
    "UnknownModelError",
    "UnsupportedModelError",
    "ask_inputs",
    "cache_folder",
    "find_model",
    "load",
    "load_shape_only",
    "load_vision",
    "load_vlm",
    "verify",
]
