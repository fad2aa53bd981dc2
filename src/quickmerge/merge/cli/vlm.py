"""What commands share that ask a vision-language model about images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quickmerge.console.options import (
    quiet,
    take_generation,
)
from quickmerge.errors import QuickmergeError


def is_vlm(name: str) -> bool:
    """Whether a model reads images and text both, by its configuration alone.

    Raises:
        QuickmergeError: there is no such model.
    """
    from quickmerge.models.compat import image_text_names
    from quickmerge.models.embedded import MODELS, VISION_MODELS
    from quickmerge.models.load import find_model
    from quickmerge.models.read import read_config, transformers_silenced

    if name in MODELS or name in VISION_MODELS:
        return False
    with transformers_silenced():
        kind = read_config(find_model(name, VISION_MODELS)).model_type
    return kind in image_text_names()


def check_vlm(name: str, images: int, prompt: str) -> None:
    """As `check_model`, for a model that is asked about so many images."""
    from quickmerge.models.chat import try_folder
    from quickmerge.models.embedded import MODELS, VISION_MODELS
    from quickmerge.models.load import find_model
    from quickmerge.models.load_vision import question_on

    if name in MODELS or name in VISION_MODELS:
        return  # load_vlm says what they are
    found = Path(find_model(name, {}))
    if found.is_dir():
        try_folder(found, question_on([None] * images, prompt))


def load_vlm(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """Model and processor, the libraries' own chatter kept quiet."""
    from quickmerge.models.load_vision import load_vlm as load

    quiet()
    vlm, processor = load(name, dtype=dtype)
    take_generation(vlm)
    return vlm, processor


def check_needs_no_question(reducer: str) -> None:
    """Raise for a method that goes by the question about an image: a vision transformer is asked none."""
    from quickmerge.merge.reducers import VISION_REDUCERS, VISUAL_TOKEN_REDUCERS

    name = reducer.split(":")[0]
    if name in VISUAL_TOKEN_REDUCERS and name not in VISION_REDUCERS:
        raise QuickmergeError(
            f"--reducer {name} goes by a question to a language model: give a vision-language model as --model, "
            f"or one of {', '.join(VISION_REDUCERS)}"
        )
