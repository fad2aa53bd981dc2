"""The weights of a model folder as they lie on disk: which tensor is in which file, and where in it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.models.folder import weight_files
from quickmerge.models.headers import read_header

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHUNK", "INDEX", "WEIGHTS", "Checkpoint", "Entry", "open_checkpoint", "read_entries"]

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHUNK = 16 * 2**20
"""Bytes that are held at once while a tensor is copied from file to file."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file."""

    name: str
    dtype: str
    """As safetensors writes it: ``F32``, ``BF16``..."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Offset of its first byte, from the start of the file."""
    end: int

    @property
    def size(self) -> int:
        """In bytes."""
        return self.end - self.start

    def chunks(self) -> Iterator[bytes]:
        """Its bytes, as they lie in the file, at most ``CHUNK`` at a time."""
        with self.file.open("rb") as file:
            file.seek(self.start)
            left = self.size
            while left:
                data = file.read(min(left, CHUNK))
                if not data:
                    raise DamagedWeightsError(f"{self.file} ends before {self.name} does: copy or download it again")
                left -= len(data)
                yield data


@dataclass(frozen=True)
class Checkpoint:
    """All tensors of a model folder, none of them read."""

    folder: Path
    files: dict[str, tuple[Entry, ...]]
    """By file name; the tensors of a file in the order in which they lie in it."""
    sharded: bool
    """Whether an index lists the files."""

    def entries(self) -> Iterator[Entry]:
        """Every tensor."""
        for entries in self.files.values():
            yield from entries

    def find(self, name: str) -> Entry | None:
        """The tensor of this name, None if there is none."""
        return next((entry for entry in self.entries() if entry.name == name), None)

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype that it was saved in.

        Raises:
            QuickmergeError: there is none of this name.
        """
        from safetensors import safe_open

        entry = self.find(name)
        if entry is None:
            raise QuickmergeError(f"{self.folder} has no tensor {name}")
        with safe_open(entry.file, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def open_checkpoint(folder: Path) -> Checkpoint:
    """Look at the headers of a model folder's weights.

    transformers reads ``model.safetensors`` where there is one, and the files of the index otherwise; so does this.

    Raises:
        QuickmergeError: the weights are not safetensors.
        DamagedWeightsError: a file is missing, truncated or garbled.
    """
    paths = weight_files(folder)
    if not paths:
        raise QuickmergeError(
            f"{folder} must hold its weights as safetensors ({WEIGHTS} or {INDEX}): load the model with transformers "
            "and save it again with save_pretrained"
        )
    sharded = paths != [folder / WEIGHTS]
    return Checkpoint(folder, {path.name: read_entries(path) for path in paths}, sharded)


def read_entries(path: Path) -> tuple[Entry, ...]:
    """The tensors of one safetensors file, in the order in which they lie in it.

    Raises:
        DamagedWeightsError: the file is truncated or garbled.
    """
    entries = [Entry(name, at.dtype, at.shape, path, at.start, at.end) for name, at in read_header(path).items()]
    return tuple(sorted(entries, key=lambda entry: (entry.start, entry.end)))
