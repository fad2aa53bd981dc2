"""What can be said about a model folder before anything heavy is loaded from it."""

from __future__ import annotations

import json
from pathlib import Path

from quickmerge.errors import DamagedWeightsError, UnknownModelError

__all__ = ["check_model_folder", "check_safetensors"]

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json")
REMEDY = "delete it and copy or download it again"


def check_model_folder(folder: Path) -> None:
    """See that a folder holds a model and that its safetensors files are whole, reading only their headers.

    Raises:
        UnknownModelError: the folder has no `config.json`, or no weights.
        DamagedWeightsError: a weights file is truncated or garbled, or a part of it is missing.
    """
    if not (folder / "config.json").is_file():
        raise UnknownModelError(f"the folder {folder} is not a model folder: it has no config.json")
    if not any(path for pattern in WEIGHTS for path in folder.glob(pattern)):
        raise UnknownModelError(f"the folder {folder} has a config.json but no weights (model.safetensors)")
    for index in folder.glob("*.safetensors.index.json"):
        _check_index(index)
    for path in folder.glob("*.safetensors"):
        check_safetensors(path)


def check_safetensors(path: Path, remedy: str = REMEDY) -> None:
    """See that a safetensors file has a readable header and exactly the bytes that the header promises.

    Raises:
        DamagedWeightsError: it does not.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size < 8 or header_bytes > size - 8:
            raise DamagedWeightsError(f"{path} is damaged (its header is cut off or garbled): {remedy}")
        try:
            header = json.loads(file.read(header_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            promised = 8 + header_bytes + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise DamagedWeightsError(f"{path} is damaged (its header is garbled): {remedy}") from error
    if size != promised:
        raise DamagedWeightsError(f"{path} is damaged ({size} bytes instead of {promised}): {remedy}")


def _check_index(index: Path) -> None:
    try:
        parts = set(json.loads(index.read_text())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedWeightsError(f"{index} is damaged (it is not a weights index): {REMEDY}") from error
    for part in sorted(parts):
        if not (index.parent / part).is_file():
            raise DamagedWeightsError(f"{index.parent / part} is missing although {index.name} lists it: {REMEDY}")
