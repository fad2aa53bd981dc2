"""A plain writer of ONNX files with weights and MatMul nodes, to read back in tests."""

from __future__ import annotations

import numpy as np


def varint(value: int) -> bytes:
    """An integer in protobuf's encoding."""
    out = b""
    while value > 127:
        out, value = out + bytes([value % 128 + 128]), value // 128
    return out + bytes([value])


def field(number: int, value: int | str | bytes) -> bytes:
    """One field of a protobuf message."""
    if isinstance(value, int):
        return varint(number * 8) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number * 8 + 2) + varint(len(data)) + data


def tensor(name: str, value: np.ndarray, *, packed: bool = False, kind: int = 1) -> bytes:
    """A TensorProto that stores its data raw."""
    sizes = field(1, b"".join(map(varint, value.shape))) if packed else b"".join(field(1, n) for n in value.shape)
    return sizes + field(2, kind) + field(8, name) + field(9, value.tobytes())


def node(operation: str, name: str, inputs: list[str]) -> bytes:
    """A NodeProto with one output."""
    return b"".join(field(1, one) for one in inputs) + field(2, f"{name}_out") + field(3, name) + field(4, operation)


def onnx_file(tensors: list[bytes], nodes: list[bytes]) -> bytes:
    """A ModelProto: a version, a producer, then the graph with its nodes, name and weights."""
    graph = b"".join(field(1, one) for one in nodes) + field(2, "g") + b"".join(field(5, one) for one in tensors)
    return field(1, 8) + field(2, "writer of the tests") + field(7, graph)
