"""A safetensors file written tensor by tensor, in bounded memory, and hashed while it is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from quickmerge.vocabulary.checkpoint import CHUNK, Entry

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Piece", "copy_piece", "file_sha256", "tensor_piece", "write_safetensors"]

NAMES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64", "uint8": "U8"}


@dataclass(frozen=True)
class Piece:
    """One tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """In bytes."""
    chunks: Callable[[], Iterator[bytes]]
    """Its bytes, a part at a time."""


def copy_piece(entry: Entry) -> Piece:
    """A tensor of another file, whose bytes are taken over unread: whatever its dtype, it stays as it is."""
    return Piece(entry.name, entry.dtype, entry.shape, entry.size, entry.chunks)


def tensor_piece(name: str, tensor: Tensor) -> Piece:
    """A tensor in memory."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    raw = flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)

    def chunks() -> Iterator[bytes]:
        for start in range(0, len(raw), CHUNK):
            yield raw[start : start + CHUNK].numpy().tobytes()

    dtype = NAMES[str(tensor.dtype).removeprefix("torch.")]
    return Piece(name, dtype, tuple(tensor.shape), len(raw), chunks)


def write_safetensors(path: Path, pieces: Sequence[Piece], advance: Callable[[int], None] | None = None) -> str:
    """Write a file; the caller sees to what happens when the disk is full.

    Args:
        path: the file.
        pieces: its tensors, which are written in this order. Whoever takes over the order of a safetensors file, in
            which the wider dtypes come first, keeps every tensor aligned.
        advance: told how many bytes were written, after each part.

    Returns:
        The sha256 of the file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers insists on it
    at = 0
    for piece in pieces:
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [at, at + piece.size]}
        at += piece.size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data begin at a multiple of eight
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for part in (len(head).to_bytes(8, "little"), head):
            digest.update(part)
            file.write(part)
        for piece in pieces:
            for part in piece.chunks():
                digest.update(part)
                file.write(part)
                if advance is not None:
                    advance(len(part))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in parts."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(CHUNK):
            digest.update(part)
    return digest.hexdigest()
