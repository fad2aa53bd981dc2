"""Hugging Face datasets that lie on disk."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, overload

from PIL import Image

from quickmerge.errors import QuickmergeError, near_match, need
from quickmerge.images import open_image

STRINGS = ("string", "large_string", "string_view")


class Column(Sequence[Any]):
    """One column of a dataset, read a row at a time.

    Attributes:
        name: what the dataset calls it.
        kind: ``"text"`` if the rows are strings, ``"images"`` if they are Pillow images, upright and in RGB.
    """

    def __init__(self, dataset: Any, name: str, kind: Literal["text", "images"]) -> None:
        self.name = name
        self.kind = kind
        # the other columns need not be decoded to read this one
        part = dataset.select_columns([name])
        # images come as bytes, and are decoded here as every image is, of no other formats
        self._dataset = part if kind == "text" else part.cast_column(name, type(part.features[name])(decode=False))

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        """One row; a missing text is an empty one."""
        if isinstance(index, slice):
            return [self[at] for at in range(len(self))[index]]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        value = self._dataset[index][self.name]
        if self.kind == "images":
            return self._image(value, f"row {index} of the column {self.name}")
        return "" if value is None else value

    @staticmethod
    def _image(value: Any, name: str) -> Image.Image:
        if not value or (value.get("bytes") is None and value.get("path") is None):
            raise QuickmergeError(f"{name} has no image")
        data, path = value.get("bytes"), value.get("path")
        if data is not None:
            return open_image(io.BytesIO(data), name)
        if "://" in path or "::" in path:
            raise QuickmergeError(f"{name} must hold its image, got an address, {path!r}: nothing is fetched")
        return open_image(Path(path), f"{name}, {path},")


def from_disk(path: Path | Sequence[Path], column: str | None = None) -> Column:
    """The texts or images of a dataset that `save_to_disk` wrote, or of `.parquet` or `.jsonl` files.

    Args:
        path: the folder or the file, or several that hold the same columns, read one after the other.
        column: the column to take; None finds it by its type.

    Raises:
        QuickmergeError: `datasets` is not installed, the data can't be read, or the column is missing, of another type
            or one of several possible ones.
    """
    datasets = need("datasets", "datasets", "Hugging Face datasets")
    paths = [path] if isinstance(path, Path) else list(path)
    if not paths:
        raise QuickmergeError("there are no datasets to train on")
    parts = [_load(datasets, part) for part in paths]
    try:
        whole = parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
    except Exception as error:
        raise QuickmergeError(
            f"{paths[0]} and the other datasets must hold the same columns: {_line(error)}"
        ) from error
    name, kind = _choose(datasets, whole.features, column, str(paths[0]))
    return Column(whole, name, kind)


def _load(datasets: ModuleType, path: Path) -> Any:
    if not path.exists():
        raise QuickmergeError(f"{path} does not exist")
    readers = {".parquet": datasets.Dataset.from_parquet, ".jsonl": datasets.Dataset.from_json}
    read = datasets.load_from_disk if path.is_dir() else readers.get(path.suffix.lower())
    if read is None:
        raise QuickmergeError(f"{path} must be a folder written by save_to_disk, or a .parquet or .jsonl file")
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        loaded = read(str(path))
    except Exception as error:  # whatever pyarrow and datasets find wrong, in many types
        raise QuickmergeError(f"{path} can't be read as a dataset: {_line(error)}") from error
    finally:
        if not silent:
            datasets.enable_progress_bars()
    if not isinstance(loaded, datasets.DatasetDict):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    if "train" not in loaded:
        raise QuickmergeError(
            f"{path} must hold a split named train, got {', '.join(loaded)}: name the folder of the split to train on"
        )
    return loaded["train"]


def _choose(
    datasets: ModuleType, features: Any, column: str | None, where: str
) -> tuple[str, Literal["text", "images"]]:
    usable: dict[str, Literal["text", "images"]] = {}
    for name, feature in features.items():
        if isinstance(feature, datasets.Image):
            usable[name] = "images"
        elif isinstance(feature, datasets.Value) and feature.dtype in STRINGS:
            usable[name] = "text"
    listed = ", ".join(f"{name} ({usable.get(name, 'neither text nor image')})" for name in features)
    if column is not None:
        if column not in usable:
            hint = near_match(column, usable) if column not in features else ""
            raise QuickmergeError(f"{where} must have a column {column!r} of texts or images{hint}, got {listed}")
        return column, usable[column]
    if not usable:
        raise QuickmergeError(f"{where} must have a column of texts or images, got {listed}")
    if len(usable) == 1:
        return next(iter(usable.items()))
    if "text" in usable and "images" not in usable.values():
        return "text", "text"
    raise QuickmergeError(f"{where} has several columns to train on, name one of them: {listed}")


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
