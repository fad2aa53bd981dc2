"""A recognizer as a folder: config.json, model.safetensors, and its models and tokenizer in folders of their own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quickmerge.errors import QuickmergeError, door
from quickmerge.files import write_json
from quickmerge.models.folder import check_files, check_model_folder
from quickmerge.models.part import CONFIG, HASH, WEIGHTS, check_hashes, file_hash, save_parts
from quickmerge.models.read import damaged, read_config, read_weights, transformers_silenced, tried
from quickmerge.models.weights import check_finite, check_floats, local_path, read_header, read_json
from quickmerge.recognition.config import RecognizerConfig
from quickmerge.recognition.network import Network
from quickmerge.together import complete, write_together

__all__ = ["load", "save"]

N = TypeVar("N", bound=Network)

VISION, LANGUAGE, TOKENIZER = "vision", "language", "tokenizer"
"""The tokenizer lies apart: beside a language model, transformers may open it as the one that is usual for its kind."""
OWN = ("projector.weight", "boundary")
"""The weights that are in neither of the two models."""
OPTIONS: dict[str, Any] = {"dtype": "auto"}


STALE = re.compile(
    r"(vision|language)/model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?"
    r"|tokenizer/(tokenizer\.json|tokenizer_config\.json|added_tokens\.json|special_tokens_map\.json|vocab\.json"
    r"|merges\.txt|chat_template\.jinja)"
)
"""What a recognizer that is replaced may have had that the new one has not, and that would be read with it."""


def save(recognizer: Network, folder: Path | str) -> None:
    """Write a recognizer among other files of a folder, whole or not at all; see `Recognizer.save_pretrained`."""
    write_together(local_path("folder", folder), lambda work: _fill(recognizer, work), STALE)


def _fill(recognizer: Network, work: Path) -> None:
    with transformers_silenced():
        save_parts(work / VISION, recognizer.vision)
        save_parts(work / LANGUAGE, recognizer.language)
        recognizer.labels.tokenizer.save_pretrained(work / TOKENIZER)
    own = {name: value for name, value in recognizer.state_dict().items() if name in OWN}
    save_file({name: value.cpu().contiguous() for name, value in own.items()}, work / WEIGHTS, {"format": "pt"})
    hashes = {path.relative_to(work).as_posix(): file_hash(path) for path in sorted(work.rglob("*.safetensors"))}
    write_json(work / CONFIG, {**recognizer.config.to_json(), HASH: hashes})


def load(kind: type[N], given: Path | str) -> N:
    """Read a recognizer of a kind; see `Recognizer.from_pretrained`."""
    folder = local_path("model", given)
    if not folder.is_dir():
        raise QuickmergeError(f"model must be a folder that holds a recognizer, got {folder}, which is none")
    complete(folder)
    config = RecognizerConfig.read(folder / CONFIG)
    for name in (VISION, LANGUAGE):
        check_model_folder(folder / name)
    check_files(folder / TOKENIZER)
    path = folder / WEIGHTS
    if not path.exists():
        raise QuickmergeError(f"{path} is missing: train or copy the recognizer again")
    check_floats(path, read_header(path))
    vision = _read_vision(folder / VISION)
    language = _read_language(folder / LANGUAGE)
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    rows = language.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise QuickmergeError(
            f"{folder / TOKENIZER} must have at most the {rows} tokens of the language model, got {len(tokenizer)}"
        )
    with torch.random.fork_rng(devices=[]):  # what is drawn here is filled at once, and leaves no trace
        recognizer = kind(vision.requires_grad_(False), language, tokenizer, config)
    try:
        own = load_file(path)
    except SafetensorError as error:
        raise damaged(str(folder), str(error)) from None
    wanted = recognizer.state_dict()
    for name in sorted({*OWN, *own}):
        if name not in own or name not in OWN or own[name].shape != wanted[name].shape:
            raise damaged(str(folder), f"{name} does not fit {CONFIG}")
    check_finite(str(path), own.items())
    check_hashes(folder, read_json(folder / CONFIG).get(HASH))
    recognizer.load_state_dict(own, strict=False)
    return recognizer.eval()


def _read_vision(folder: Path) -> PreTrainedModel:
    source = str(folder)
    with transformers_silenced():
        config = read_config(source)
        model, lacking = read_weights(AutoModel, source, config, OPTIONS)
        if lacking and all(name.startswith("pooler.") for name in lacking):
            # taken from a classifier, which has no pooler; nobody asks for it here
            model, lacking = read_weights(AutoModel, source, config, {**OPTIONS, "add_pooling_layer": False})
    if lacking:
        raise damaged(source, f"{len(lacking)} tensors are missing, {lacking[0]} first")
    return model


def _read_language(folder: Path) -> PreTrainedModel:
    source = str(folder)
    with transformers_silenced():
        model, lacking = read_weights(AutoModelForCausalLM, source, read_config(source), OPTIONS)
    if lacking:
        raise damaged(source, f"{len(lacking)} tensors are missing, {lacking[0]} first")
    return model


def _read_tokenizer(folder: Path) -> Any:
    with door(f"{folder} holds no tokenizer that can be read"), transformers_silenced():
        return tried(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))
