"""A model without its weights: enough to count tokens, operations and bytes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.data import shipped_shape
from quickmerge.errors import UnknownModelError, UnsupportedModelError, door
from quickmerge.models.console import transformers_silenced
from quickmerge.models.folder import CONFIG, check_files
from quickmerge.models.hub import hub_folder
from quickmerge.models.load import find_name
from quickmerge.models.read import check_causal, read_config
from quickmerge.models.sizes import check_build

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["load_shape_only"]


def load_shape_only(name: str) -> PreTrainedModel:
    """The model on the meta device: all shapes, no values, nothing but its config read.

    Neither weights nor a cache are needed for an embedded model or a folder.

    Raises:
        UnknownModelError: there is no such model.
        UnsupportedModelError: it is not a causal language model, or its config asks for sizes that no model has.
        DamagedWeightsError: its config is damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder = shipped_shape(name) or _folder(name)
    with transformers_silenced():
        config = read_config(str(folder))
        check_causal(str(folder), config)

        def build() -> PreTrainedModel:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)

        check_build(str(folder / CONFIG), build, None)
        with door(f"{folder / CONFIG} can't be used", UnsupportedModelError), torch.device("meta"):
            return build()


def _folder(name: str) -> Path:
    found = find_name(name)
    if not Path(found).is_dir():
        return hub_folder(found, weights=False)
    folder = Path(found)
    check_files(folder)
    if not (folder / CONFIG).exists():
        raise UnknownModelError(f"the folder {folder} is not a model folder: it has no config.json")
    return folder
