"""What can be said about a model folder before anything heavy is loaded from it.

All doors lead through here: a folder may be a stranger's. Its files must be regular ones of sizes that such files have,
its weights safetensors of floating point numbers, and its config must ask for no more than the weights hold.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from quickmerge.errors import DamagedWeightsError, UnknownModelError
from quickmerge.models.weights import (
    CONFIG_BYTES,
    REMEDY,
    Held,
    check_floats,
    check_integers,
    check_regular,
    check_safetensors,
    read_header,
    read_json,
)
from quickmerge.together import complete

__all__ = ["check_files", "check_model_folder", "check_safetensors", "held_by", "weight_files"]

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TEXT_BYTES = 1 << 28
"""Of a tokenizer, its vocabulary or an index; the largest published ones have a sixth of that."""
SMALL = {
    CONFIG: CONFIG_BYTES, GENERATION: CONFIG_BYTES, "preprocessor_config.json": CONFIG_BYTES,
    "processor_config.json": CONFIG_BYTES, "video_preprocessor_config.json": CONFIG_BYTES,
    "special_tokens_map.json": CONFIG_BYTES, "adapter_config.json": CONFIG_BYTES, "chat_template.jinja": CONFIG_BYTES,
    "chat_template.json": CONFIG_BYTES, "tokenizer_config.json": 1 << 25, "added_tokens.json": 1 << 25,
}  # fmt: skip
"""Bytes that a file of this name may have."""
LARGE = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", INDEX)
READ = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".safetensors")
"""Endings of files that somebody may open in a model folder."""


def check_model_folder(folder: Path) -> None:
    """See that a folder holds a model and that its files are sound, reading only configs and headers.

    Raises:
        UnknownModelError: the folder has no `config.json`, or no weights as safetensors.
        DamagedWeightsError: a file is no regular one or too large; weights are truncated, garbled, no floating point
            numbers, or a part of them is missing.
        UnsupportedModelError: the config asks for more than the weights hold.
    """
    complete(folder)
    check_files(folder)
    if not (folder / CONFIG).is_file():
        raise UnknownModelError(f"the folder {folder} is not a model folder: it has no config.json{_gguf(folder)}")
    config = read_json(folder / CONFIG)
    held = held_by(folder, config)
    if held is None:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        found = f"; {pickles[0]} may hold a program and is not read: convert it to safetensors" if pickles else ""
        found = found or _gguf(folder)
        raise UnknownModelError(f"the folder {folder} has a config.json but no weights (model.safetensors){found}")
    check_integers(str(folder / CONFIG), config, held)


def _gguf(folder: Path) -> str:
    """How a GGUF file in a folder is opened, in words; nothing where there is none."""
    files = sorted(folder.glob("*.gguf"))
    if not files:
        return ""
    return (
        f"; {files[0].name} is opened by transformers, AutoModelForCausalLM.from_pretrained(folder, gguf_file=...), "
        "whose model quickmerge.reduce takes as it is"
    )


def check_files(folder: Path) -> None:
    """See that what may be opened in a folder of a model or a tokenizer are regular files of sensible sizes.

    Raises:
        DamagedWeightsError: one is not: a folder, a device, a pipe, or far too large; or JSON that is none.
    """
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UnknownModelError(f"the folder {folder} can't be read ({error.strerror})") from None
    for name in names:
        path = folder / name
        if name in SMALL or path.suffix in READ:
            if not path.exists() and path.is_symlink():
                raise DamagedWeightsError(f"{path} is a link to nothing: {REMEDY}")
            check_regular(path, SMALL.get(name, TEXT_BYTES if name in LARGE else None))
        if name == GENERATION:
            read_json(path)
    templates = folder / "additional_chat_templates"
    if templates.is_dir():
        for path in sorted(templates.iterdir()):
            check_regular(path, CONFIG_BYTES)


def weight_files(folder: Path) -> list[Path]:
    """The files of a model's weights as safetensors: one, or the parts that an index lists; none if there are none.

    Raises:
        DamagedWeightsError: the index is damaged, or names a file that is missing or lies elsewhere.
    """
    files = [folder / WEIGHTS] if (folder / WEIGHTS).is_file() else []
    for index in sorted(folder.glob("*.safetensors.index.json")):
        parts = read_index(index)
        if index.name == INDEX and not files:
            files = parts
    return files


def read_index(index: Path) -> list[Path]:
    """The files that an index of weights lists, all of them there and in the index's own folder."""
    weight_map = read_json(index, TEXT_BYTES, REMEDY).get("weight_map") if _is_object(index) else None
    if not isinstance(weight_map, dict) or not all(isinstance(part, str) for part in weight_map.values()):
        raise DamagedWeightsError(f"{index} is damaged (it is not a weights index): {REMEDY}")
    parts = sorted(set(weight_map.values()))
    for part in parts:
        if Path(part).name != part or part in ("", ".", ".."):
            raise DamagedWeightsError(f"{index} names {part!r}, but weights must lie in its own folder: {REMEDY}")
        if not (index.parent / part).is_file():
            raise DamagedWeightsError(f"{index.parent / part} is missing although {index.name} lists it: {REMEDY}")
        if not part.endswith(".safetensors"):
            raise DamagedWeightsError(f"{index} names {part!r}, but weights must be safetensors: {REMEDY}")
    return [index.parent / part for part in parts]


def _is_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def held_by(folder: Path, config: dict[str, Any]) -> Held | None:
    """What the weights of a folder hold, by their headers, which are checked; None if there are no weights.

    Raises:
        DamagedWeightsError: weights are truncated, garbled, missing or no floating point numbers.
    """
    files = weight_files(folder)
    packed = isinstance(config.get("quantization_config"), dict)
    headers = {path: read_header(path) for path in files}
    for path, header in headers.items():
        check_floats(path, header, packed=packed)
    for path in sorted(folder.glob("*.safetensors")):
        if path not in headers:
            check_safetensors(path)
    return Held.of(headers.values(), packed) if files else None
