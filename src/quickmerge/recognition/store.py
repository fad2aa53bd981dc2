"""A recognizer as a folder: config.json, model.safetensors, and its models and tokenizer in folders of their own."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_json
from quickmerge.models.console import transformers_silenced
from quickmerge.models.folder import check_model_folder, check_safetensors
from quickmerge.models.read import damaged, first_sentence, read_config, read_weights
from quickmerge.recognition.config import RecognizerConfig

if TYPE_CHECKING:
    from quickmerge.recognition.model import Recognizer

__all__ = ["load", "save"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
VISION, LANGUAGE, TOKENIZER = "vision", "language", "tokenizer"
"""The tokenizer lies apart: beside a language model, transformers may open it as the one that is usual for its kind."""
OWN = ("projector.weight", "boundary")
"""The weights that are in neither of the two models."""
OPTIONS: dict[str, Any] = {"dtype": "auto"}


def save(recognizer: Recognizer, folder: Path) -> None:
    """Write a recognizer among other files of a folder; see `Recognizer.save_pretrained`.

    Everything is written aside first. Then config.json, without which there is no recognizer, goes; the parts are
    moved in; the new config.json comes last. So what can be loaded is always whole.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_over in folder.glob(".recognizer.*.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
        work = Path(tempfile.mkdtemp(dir=folder, prefix=".recognizer.", suffix=".tmp"))
        try:
            _fill(recognizer, work)
            _move_in(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise QuickmergeError(f"{folder} can't be written ({getattr(error, 'strerror', None) or error})") from error


def _fill(recognizer: Recognizer, work: Path) -> None:
    with transformers_silenced():
        recognizer.vision.save_pretrained(work / VISION)
        recognizer.language.save_pretrained(work / LANGUAGE)
        recognizer.labels.tokenizer.save_pretrained(work / TOKENIZER)
    own = {name: value for name, value in recognizer.state_dict().items() if name in OWN}
    save_file({name: value.cpu().contiguous() for name, value in own.items()}, work / WEIGHTS, {"format": "pt"})
    write_json(work / CONFIG, recognizer.config.to_json())
    for path in work.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # weights are written for the owner alone
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _move_in(work: Path, folder: Path) -> None:
    (folder / CONFIG).unlink(missing_ok=True)
    for name in (VISION, LANGUAGE, TOKENIZER):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in (VISION, LANGUAGE, TOKENIZER, WEIGHTS, CONFIG):
        os.replace(work / name, folder / name)


def load(folder: Path) -> Recognizer:
    """Read a recognizer; see `Recognizer.from_pretrained`."""
    from quickmerge.recognition.model import Recognizer

    if not folder.is_dir():
        raise QuickmergeError(f"model must be a folder that holds a recognizer, got {folder}, which is none")
    config = RecognizerConfig.read(folder / CONFIG)
    for name in (VISION, LANGUAGE):
        check_model_folder(folder / name)
    path = folder / WEIGHTS
    if not path.is_file():
        raise QuickmergeError(f"{path} is missing: train or copy the recognizer again")
    check_safetensors(path)
    vision = _read_vision(folder / VISION)
    language = _read_language(folder / LANGUAGE)
    tokenizer = _read_tokenizer(folder / TOKENIZER)
    recognizer = Recognizer(vision.requires_grad_(False), language, tokenizer, config)
    try:
        own = load_file(path)
    except SafetensorError as error:
        raise damaged(str(folder), str(error)) from None
    wanted = recognizer.state_dict()
    for name in sorted({*OWN, *own}):
        if name not in own or name not in OWN or own[name].shape != wanted[name].shape:
            raise damaged(str(folder), f"{name} does not fit {CONFIG}")
        if not bool(own[name].isfinite().all()):
            raise damaged(str(folder), f"{name} holds values that are not finite")
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
    try:
        with transformers_silenced():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise QuickmergeError(f"{folder} holds no tokenizer that can be read ({first_sentence(error)})") from error
