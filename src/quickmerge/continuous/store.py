"""A CALM as a folder: config.json, model.safetensors with the autoencoder inside, and the tokenizer's files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from quickmerge.continuous.config import CalmConfig
from quickmerge.continuous.model import CalmForCausalLM
from quickmerge.errors import QuickmergeError, UnsupportedModelError, door
from quickmerge.models.console import transformers_silenced
from quickmerge.models.folder import check_model_folder
from quickmerge.models.read import damaged, read_config, read_weights
from quickmerge.models.tried import tried

__all__ = ["load_calm"]


def load_calm(folder: Path | str, **options: Any) -> tuple[CalmForCausalLM, Any]:
    """Open a CALM and its tokenizer, ready to generate.

    Args:
        folder: where `quickmerge train calm` saved it.
        **options: of transformers' ``from_pretrained``, such as ``dtype``. Default: float32.

    Returns:
        The model in evaluation mode, and its tokenizer, which pads on the left.

    Raises:
        QuickmergeError: there is none, it is another model, or its files are damaged or incomplete.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise QuickmergeError(f"model must be a folder that holds a CALM, but there is no folder {folder}")
    check_model_folder(folder)
    with transformers_silenced():
        config = read_config(str(folder))
        if not isinstance(config, CalmConfig):
            raise UnsupportedModelError(
                f"model must be a folder that holds a CALM, but {folder} holds a {config.model_type}: "
                "`quickmerge train calm` makes one"
            )
        with door(f"{folder} has no usable tokenizer", UnsupportedModelError):
            tokenizer = tried(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
        model, lacking = read_weights(CalmForCausalLM, str(folder), config, {"dtype": "float32", **options})
    if lacking:
        raise damaged(str(folder), f"{len(lacking)} tensors are missing, {lacking[0]} first")
    if len(tokenizer) > config.pad_token_id:
        raise QuickmergeError(
            f"the tokenizer in {folder} must have the {config.pad_token_id} tokens that the model was trained with, "
            f"got {len(tokenizer)}"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer
