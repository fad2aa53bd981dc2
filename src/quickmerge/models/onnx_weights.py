"""Reading the weights of an ONNX file, and nothing else of it.

ONNX is protobuf (source: onnx.proto of ONNX's IR specification, and protobuf's description of its wire encoding). A
message is a run of fields; each begins with a variable-length integer ``number << 3 | wire type``. The wire types in
use are 0 (an integer), 1 and 5 (8 and 4 bytes) and 2 (a length, then so many bytes: text, raw data, or a message).
Of the messages that ONNX defines, the weights need these fields:

    ModelProto   7 graph
    GraphProto   1 node (repeated), 5 initializer (repeated)
    NodeProto    1 input (repeated), 3 name, 4 op_type
    TensorProto  1 dims (repeated), 2 data_type, 8 name, 9 raw_data
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from quickmerge.errors import DamagedWeightsError, UnsupportedModelError

__all__ = ["OnnxWeights", "read_onnx"]

FLOAT = 1  # TensorProto.DataType
Value: TypeAlias = "int | memoryview"


@dataclass(frozen=True)
class OnnxWeights:
    """What an ONNX file holds for a conversion.

    Attributes:
        tensors: the float32 initializers by name, in their own shapes; read-only views of the file's bytes.
        matmul: for each MatMul node with an initializer as its second input, the initializer's name by the node's.
            An exporter that folds a linear layer's transpose leaves its weight, `(in, out)`, without a name of its
            own, and only the node still says which layer it belongs to.
    """

    tensors: dict[str, NDArray[np.float32]]
    matmul: dict[str, str]


def read_onnx(path: Path) -> OnnxWeights:
    """Read the float32 initializers and the names of the MatMul nodes.

    Raises:
        DamagedWeightsError: the file is not ONNX, or is cut off.
        UnsupportedModelError: a tensor of it is not float32 stored in the file itself.
    """
    tensors: dict[str, NDArray[np.float32]] = {}
    nodes: list[tuple[str, list[str]]] = []
    try:
        for number, graph in _fields(memoryview(path.read_bytes())):
            if number != 7:
                continue
            for kind, value in _fields(_message(graph)):
                if kind == 1:
                    nodes += _matmul(_message(value))
                elif kind == 5:
                    name, tensor = _tensor(_message(value))
                    if name in tensors:
                        raise ValueError(f"it holds the tensor {name!r} twice")
                    if not np.isfinite(tensor).all():
                        raise ValueError(f"its tensor {name!r} holds numbers that are not finite")
                    tensors[name] = tensor
    except (ValueError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, UnsupportedModelError):
            raise
        raise DamagedWeightsError(f"{path} is damaged ({error}): download it again") from error
    if not tensors:
        raise DamagedWeightsError(f"{path} is damaged (there are no weights in it): download it again")
    matmul = {name: inputs[1] for name, inputs in nodes if len(inputs) == 2 and inputs[1] in tensors}
    return OnnxWeights(tensors, matmul)


def _matmul(node: memoryview) -> Iterator[tuple[str, list[str]]]:
    inputs, name, operation = [], "", ""
    for number, value in _fields(node):
        if number == 1:
            inputs.append(_text(value))
        elif number == 3:
            name = _text(value)
        elif number == 4:
            operation = _text(value)
    if operation == "MatMul":
        yield name, inputs


def _tensor(tensor: memoryview) -> tuple[str, NDArray[np.float32]]:
    shape: list[int] = []
    name, kind, raw = "", 0, None
    for number, value in _fields(tensor):
        if number == 1:  # one field an integer, or all of them packed into one
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _message(value)
    if kind != FLOAT or raw is None:
        raise UnsupportedModelError(
            f"the ONNX tensor {name!r} must be float32 stored in the file itself, got data type {kind}"
            + (" without raw data" if raw is None else "")
        )
    return name, np.frombuffer(raw, dtype="<f4").reshape(shape)


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        wire = tag & 7
        if wire == 0:
            value: Value
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            length, at = _varint(message, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError(f"no field of an ONNX file has wire type {wire}")
        if at + length > len(message):
            raise ValueError("it is cut off")
        yield tag >> 3, message[at : at + length]
        at += length


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The integer that begins at `at`, seven bits a byte with the lowest first, and where the next field begins."""
    value = shift = 0
    while True:
        if at >= len(message) or shift > 63:
            raise ValueError("it is cut off" if at >= len(message) else "an integer of it is too long")
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _packed(values: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(values):
        value, at = _varint(values, at)
        found.append(value)
    return found


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("it holds an integer where there must be bytes")
    return value


def _text(value: Value) -> str:
    return bytes(_message(value)).decode()
