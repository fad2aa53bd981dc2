"""The donor: vectors for the tokens of the vocabulary that is wanted. Only its matrices are read, no layer of it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.errors import QuickmergeError
from quickmerge.models.cache import cache_folder
from quickmerge.models.tokenizers import TOKENIZERS, prepare_tokenizer
from quickmerge.vocabulary.checkpoint import Entry, open_checkpoint, read_entries
from quickmerge.vocabulary.matrices import FLOATS, find_matrices
from quickmerge.vocabulary.source import model_folder

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Donor", "read_donor"]


@dataclass(frozen=True)
class Donor:
    """The vectors of a donor, in float32 (float64 where they are saved so)."""

    name: str
    input: Tensor
    """``(V, d)``, a row for every token id."""
    output: Tensor
    """``(V, d')``: its output matrix; the input matrix again where it has no other."""
    kind: str
    """What it is, for the report: "model, tied"..."""

    @property
    def rows(self) -> int:
        """How many tokens it has vectors for."""
        return int(self.input.shape[0])


def read_donor(donor: str | os.PathLike[str], *, progress: bool = True) -> Donor:
    """Read a donor's vectors.

    Args:
        donor: a model (an embedded name, a folder, a hub id), or a ``.safetensors`` file, or a folder of one such file,
            which holds one matrix with a row for every token id.
        progress: whether to show that something is fetched.

    Raises:
        QuickmergeError: it is neither, or its vectors are not plain finite numbers.
        UnknownModelError: there is no such model.
        DamagedWeightsError: its weights are truncated or garbled.
    """
    name = os.fspath(donor)
    if name in TOKENIZERS:
        return _vectors(name, prepare_tokenizer(name, cache_folder(None), progress=progress))
    path = Path(name).expanduser()
    if path.is_file() or (path.is_dir() and not (path / "config.json").is_file()):
        return _vectors(name, path)
    from quickmerge.models.console import transformers_silenced
    from quickmerge.models.read import read_config

    folder = model_folder(name, progress=progress)
    checkpoint = open_checkpoint(folder)
    with transformers_silenced():
        config = read_config(str(folder))
    matrices = find_matrices(checkpoint, config, donor=True)
    rows = _numbers(matrices.input, checkpoint.read(matrices.input.name))
    head = matrices.output
    output = rows if head is None else _numbers(head, checkpoint.read(head.name))
    return Donor(name, rows, output, "model, input matrix for both" if head is None else "model, two matrices")


def _vectors(name: str, path: Path) -> Donor:
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if len(files) != 1 or files[0].suffix != ".safetensors":
        raise QuickmergeError(
            f"donor must be a model, or a .safetensors file or a folder of one such file with a vector for each token, "
            f"got {name!r} with {len(files) if path.is_dir() else 'another kind of file'}"
            + (" such files" if path.is_dir() else "")
        )
    entries = [entry for entry in read_entries(files[0]) if len(entry.shape) == 2]
    if len(entries) != 1:
        raise QuickmergeError(f"donor must hold one matrix of vectors, got {len(entries)} of them in {files[0]}")
    from safetensors import safe_open

    with safe_open(files[0], framework="pt") as file:
        rows = _numbers(entries[0], file.get_tensor(entries[0].name))
    return Donor(name, rows, rows, "vectors")


def _numbers(entry: Entry, tensor: Tensor) -> Tensor:
    import torch

    if entry.dtype not in FLOATS:
        raise QuickmergeError(f"{entry.name} of the donor must be in one of {', '.join(FLOATS)}, got {entry.dtype}")
    rows = tensor if tensor.dtype == torch.float64 else tensor.float()
    finite = torch.isfinite(rows).all(-1)
    if not bool(finite.all()):
        bad = int((~finite).nonzero()[0])
        raise QuickmergeError(f"{entry.name} of the donor must be finite numbers, got others in row {bad}")
    return rows
