import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_file import field, node, onnx_file, tensor, varint
from strategies import prop, seeds

from quickmerge.errors import DamagedWeightsError, UnsupportedModelError
from quickmerge.models.onnx_weights import read_onnx

SHAPES = st.lists(st.lists(st.integers(1, 200), max_size=3).filter(lambda s: np.prod(s) < 5000), min_size=1, max_size=4)


@prop(60)
@given(shapes=SHAPES, packed=st.booleans(), seed=seeds)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], packed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    written = {f"weights of {i} ü": rng.standard_normal(shape).astype("<f4") for i, shape in enumerate(shapes)}
    nodes = [node("MatMul", f"/layer.{i}/MatMul", [f"x{i}", name]) for i, name in enumerate(written)]
    nodes += [node("Add", "/add", ["x0", next(iter(written))]), node("MatMul", "/scores/MatMul", ["q", "k"])]
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    path.write_bytes(onnx_file([tensor(name, value, packed=packed) for name, value in written.items()], nodes))
    read = read_onnx(path)
    assert list(read.tensors) == list(written)
    for name, value in written.items():
        assert read.tensors[name].shape == value.shape
        assert np.array_equal(read.tensors[name], value)
    assert read.matmul == {f"/layer.{i}/MatMul": name for i, name in enumerate(written)}


def test_unknown_fields_are_passed_over(tmp_path: Path) -> None:
    fixed = varint(20 * 8 + 1) + struct.pack("<d", 1.0) + varint(21 * 8 + 5) + struct.pack("<f", 1.0)
    weights = tensor("w", np.ones(3, np.float32)) + fixed + field(300, "text") + field(1000, 2**40)
    path = tmp_path / "model.onnx"
    path.write_bytes(fixed + onnx_file([weights], []) + fixed)
    assert read_onnx(path).tensors["w"].tolist() == [1, 1, 1]


def test_a_file_that_breaks_off_anywhere_is_damage(tmp_path: Path) -> None:
    whole = onnx_file([tensor("w", np.ones((2, 3), np.float32))], [node("MatMul", "/a/MatMul", ["x", "w"])])
    path = tmp_path / "model.onnx"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedWeightsError, match=r"model\.onnx is damaged"):
            read_onnx(path)


@pytest.mark.parametrize(
    "content",
    [
        b"not an ONNX file",
        b"\xff" * 40,
        onnx_file([], [node("MatMul", "/a", ["x", "w"])]),
        onnx_file([tensor("w", np.ones(3, np.float32))[:-4]], []),
        onnx_file([field(1, 4) + field(2, 1) + field(8, "w") + field(9, b"12345678")], []),
        onnx_file([field(1, 1) + field(2, 1) + field(8, 5) + field(9, b"1234")], []),
        onnx_file([field(1, 1) + field(2, 1) + field(8, b"\xff") + field(9, b"1234")], []),
    ],
)
def test_nonsense_is_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(DamagedWeightsError, match="download it again"):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (tensor("w", np.ones(3, np.float16), kind=10), "'w' must be float32 .* got data type 10"),
        (field(1, 3) + field(2, 1) + field(8, "w"), "'w' must be float32 .* without raw data"),
    ],
)
def test_other_storage_is_refused(tmp_path: Path, weights: bytes, said: str) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_file([weights], []))
    with pytest.raises(UnsupportedModelError, match=said):
        read_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "shape", [[10**9, 10**9], [2**64 - 1], [2**64 - 1, 4], [2**69], [1] * 100, [3], [0], [2, 2, 2]]
)
def test_counts_that_lie_are_damage(shape: list[int], tmp_path: Path) -> None:
    """Four numbers, whatever the file says of them; nothing is allocated for what is not there."""
    lying = b"".join(field(1, axis) for axis in shape) + field(2, 1) + field(8, "w") + field(9, b"\0" * 16)
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file([lying], []))
    with pytest.raises(DamagedWeightsError, match=r"model\.onnx is damaged \(.*\): download it again") as told:
        read_onnx(path)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("length", [2**31, 2**62, 2**63 - 1])
def test_lengths_that_lie_are_damage(length: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(varint(7 << 3 | 2) + varint(length) + b"abc")
    with pytest.raises(DamagedWeightsError, match="it is cut off"):
        read_onnx(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_damage(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file([tensor("w", np.array([1, bad], np.float32))], []))
    with pytest.raises(DamagedWeightsError, match="'w' holds numbers that are not finite"):
        read_onnx(path)


def test_a_tensor_that_is_there_twice_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_file([tensor("w", np.ones(2, np.float32)), tensor("w", np.zeros(2, np.float32))], []))
    with pytest.raises(DamagedWeightsError, match="the tensor 'w' twice"):
        read_onnx(path)
