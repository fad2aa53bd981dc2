"""A model without its weights: enough to count tokens, operations and bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickmerge.models.cache import cache_folder
from quickmerge.models.embedded import MODELS, prepare_embedded
from quickmerge.models.load import find_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_shape_only"]


def load_shape_only(name: str) -> PreTrainedModel:
    """The model on the meta device: all shapes, no values, nothing but its config read.

    Raises:
        UnknownModelError: there is no such model.
        UnsupportedModelError: it is not a causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from quickmerge.errors import UnsupportedModelError

    source = str(prepare_embedded(name, cache_folder(None), progress=True)) if name in MODELS else find_model(name)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except ValueError:
        raise UnsupportedModelError(f"{name} ({type(config).__name__}) is not a causal language model") from None
