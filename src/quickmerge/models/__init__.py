"""Loading: any Hugging Face causal language model, and an embedded default that needs no hub."""

from quickmerge.errors import (
    CacheFolderError,
    DamagedWeightsError,
    FetchError,
    UnknownModelError,
    UnsupportedModelError,
)
from quickmerge.models.cache import cache_folder
from quickmerge.models.load import MODELS, find_model, load, verify
from quickmerge.models.shape import load_shape_only

__all__ = [
    "MODELS",
    "CacheFolderError",
    "DamagedWeightsError",
    "FetchError",
    "UnknownModelError",
    "UnsupportedModelError",
    "cache_folder",
    "find_model",
    "load",
    "load_shape_only",
    "verify",
]
