"""The header of a safetensors file: what it holds, read and checked without its tensors.

A file begins with the length of its header, eight bytes with the lowest first; the header is JSON that gives dtype,
shape and place of each tensor (source: the description of the format by its authors, github.com/huggingface/
safetensors). All of it may be a stranger's, so nothing is taken at its word.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickmerge.errors import DamagedWeightsError
from quickmerge.models.paths import check_regular

__all__ = ["FLOATS", "HEADER_BYTES", "REMEDY", "Held", "Tensor", "check_floats", "check_safetensors", "read_header"]

REMEDY = "delete it and copy or download it again"
HEADER_BYTES = 100_000_000
"""safetensors itself reads no longer header."""
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Bits of a number, by the name of its dtype."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""What weights may be stored in."""


@dataclass(frozen=True)
class Tensor:
    """What a header says about one tensor.

    Attributes:
        dtype: as safetensors writes it, such as ``"F32"``.
        shape: its sizes.
        start: offset of its first byte, from the start of the file.
        end: offset behind its last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Held:
    """How much some weights hold, which bounds what a config may ask for.

    Attributes:
        tensors: how many.
        elements: numbers in all of them; for packed ones, the most that they can stand for.
        largest: the longest side of any.
    """

    tensors: int
    elements: int
    largest: int

    @classmethod
    def of(cls, headers: Iterable[Mapping[str, Tensor]], packed: bool = False) -> Held:
        """Of some files; ``packed`` where several numbers may lie in one element."""
        each = [tensor for header in headers for tensor in header.values()]
        elements = sum(math.prod(tensor.shape) for tensor in each) * (8 if packed else 1)
        return cls(len(each), elements, max((size for tensor in each for size in tensor.shape), default=0))


def check_safetensors(path: Path, remedy: str = REMEDY) -> None:
    """See that a safetensors file has a sound header and exactly the bytes that the header promises.

    Raises:
        DamagedWeightsError: it does not.
    """
    read_header(path, remedy)


def read_header(path: Path, remedy: str = REMEDY) -> dict[str, Tensor]:
    """The tensors that a safetensors file holds, by name; none of them is read.

    Raises:
        DamagedWeightsError: it is no regular file; the header is cut off, garbled or longer than safetensors allows;
            or dtypes, shapes, places and the size of the file don't fit each other.
    """
    check_regular(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DamagedWeightsError(f"{path} is damaged (its header is cut off or garbled): {remedy}")
        if length > HEADER_BYTES:
            raise DamagedWeightsError(
                f"{path} is damaged (its header has {length:,} bytes, at most {HEADER_BYTES:,} are read): {remedy}"
            )
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            tensors = {name: _tensor(entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise DamagedWeightsError(f"{path} is damaged (its header is garbled): {remedy}") from error
    at = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        bits = BITS.get(tensor.dtype)
        if bits is None:
            raise DamagedWeightsError(f"{path} holds {name!r} in the unknown dtype {tensor.dtype!r}: {remedy}")
        if tensor.start != at:
            raise DamagedWeightsError(f"{path} is damaged (its header leaves a gap in front of {name!r}): {remedy}")
        if (tensor.end - tensor.start) * 8 != math.prod(tensor.shape) * bits:
            raise DamagedWeightsError(
                f"{path} is damaged ({name!r} has {tensor.end - tensor.start} bytes, which is not what {tensor.dtype} "
                f"of shape {list(tensor.shape)} takes): {remedy}"
            )
        at = tensor.end
    if size != at:
        raise DamagedWeightsError(f"{path} is damaged ({size} bytes instead of {at}): {remedy}")
    return tensors


def _tensor(entry: dict[str, Any], origin: int) -> Tensor:
    dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    numbers = [*shape, start, end]
    if not isinstance(dtype, str) or len(shape) > 32 or not isinstance(shape, list):
        raise TypeError("not the description of a tensor")
    if any(type(number) is not int or not 0 <= number < 2**63 for number in numbers) or end < start:
        raise ValueError("not a size")
    return Tensor(dtype, tuple(shape), origin + start, origin + end)


def check_floats(path: Path, tensors: Mapping[str, Tensor], *, packed: bool = False) -> None:
    """See that weights are floating point numbers, which is what every model computes with.

    Counters and indices that some models save beside their weights, such as ``position_ids``, may be integers.

    Args:
        path: the file, for the message.
        tensors: its header.
        packed: whether the config says that the weights are quantised; then integers and 8-bit floats are let pass,
            and it is for transformers to say whether it can use them.

    Raises:
        DamagedWeightsError: a weight is not.
    """
    for name, tensor in tensors.items():
        if tensor.dtype in FLOATS:
            continue
        counter = tensor.dtype[0] in "IUB" and not name.rsplit(".", 1)[-1].endswith(("weight", "weights"))
        if counter or (packed and tensor.dtype != "BOOL" and tensor.dtype != "C64"):
            continue
        raise DamagedWeightsError(
            f"{path} holds {name!r} as {tensor.dtype}, but weights must be one of {', '.join(FLOATS)}"
            + ("" if packed else "; quantised ones need a quantization_config in config.json")
        )
