from pathlib import Path

import pytest
import torch
from transplant_samples import model_folder, same_bits, tensors

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.transplant.checkpoint import (
    copy_piece,
    file_sha256,
    open_checkpoint,
    read_entries,
    tensor_piece,
    write_safetensors,
)


@pytest.mark.parametrize("shard", [None, "20KB"])
def test_every_tensor_is_found_and_read(tmp_path: Path, shard: str | None) -> None:
    folder = model_folder(tmp_path / "m", shard=shard)
    checkpoint = open_checkpoint(folder)
    expected = tensors(folder)
    assert checkpoint.sharded is (shard is not None) and len(checkpoint.files) == (6 if shard else 1)
    assert {entry.name for entry in checkpoint.entries()} == set(expected)
    for entry in checkpoint.entries():
        assert same_bits(checkpoint.read(entry.name), expected[entry.name])
        assert b"".join(entry.chunks()) == expected[entry.name].numpy().tobytes()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", shard="20KB")
    with pytest.raises(QuickmergeError, match="has no tensor x"):
        open_checkpoint(folder).read("x")
    (folder / "model-00002-of-00006.safetensors").unlink()
    with pytest.raises(DamagedWeightsError, match=r"00002-of-00006\.safetensors is missing"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(QuickmergeError, match="must hold its weights as safetensors"):
        open_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8])
def test_a_file_written_in_parts_is_a_safetensors_file(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors.torch import load_file

    from quickmerge.transplant import checkpoint
    from quickmerge.transplant import checkpoint as stream

    monkeypatch.setattr(checkpoint, "CHUNK", 7)
    monkeypatch.setattr(stream, "CHUNK", 7)
    torch.manual_seed(0)
    given = {
        "a": (torch.randn(5, 3) * 40).to(dtype),
        "b": torch.zeros(0, 3, dtype=dtype),
        "é": torch.ones((), dtype=dtype),
    }
    told: list[int] = []
    first = tmp_path / "a.safetensors"
    digest = write_safetensors(first, [tensor_piece(name, value) for name, value in given.items()], told.append)
    read = load_file(first)
    assert set(read) == set(given) and all(same_bits(read[name], given[name]) for name in given)
    assert digest == file_sha256(first) and sum(told) == sum(v.numel() * v.element_size() for v in given.values())
    second = tmp_path / "b.safetensors"
    write_safetensors(second, [copy_piece(entry) for entry in read_entries(first)])
    assert second.read_bytes() == first.read_bytes()
