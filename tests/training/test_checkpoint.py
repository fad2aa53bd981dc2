import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from training_samples import saved

from quickmerge.errors import DamagedWeightsError, QuickmergeError
from quickmerge.training import checkpoint
from quickmerge.training.checkpoint import MODEL, OPTIMIZER, STATE, Checkpoint, folder, load, newest, save


def at(step: int) -> Checkpoint:
    return Checkpoint(step, {"weight": torch.full((3,), float(step))}, {}, {"seconds": 1.5})


def test_the_last_two_are_kept_and_come_back(tmp_path: Path) -> None:
    for step in (1, 2, 1_000_000):
        save(tmp_path, at(step))
    assert saved(tmp_path) == ["step-000002", "step-1000000"]
    found, damaged = newest(tmp_path)
    assert found is not None and damaged == []
    assert found.step == 1_000_000 and found.state["seconds"] == 1.5
    assert torch.equal(found.model["weight"], torch.full((3,), 1e6))


def test_nothing_is_pickled(tmp_path: Path) -> None:
    save(tmp_path, at(1))
    assert sorted(path.name for path in folder(tmp_path, 1).iterdir()) == [MODEL, OPTIMIZER, STATE]


@pytest.mark.parametrize("name", [MODEL, OPTIMIZER, STATE])
@pytest.mark.parametrize("damage", ["gone", "cut", "garbled", "empty"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage: str) -> None:
    for step in (1, 2):
        save(tmp_path, at(step))
    path = folder(tmp_path, 2) / name
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-3], "garbled": b"\xff" * len(data), "empty": b""}[damage])
    with pytest.raises(DamagedWeightsError, match="step-000002"):
        load(folder(tmp_path, 2))
    found, damaged = newest(tmp_path)
    assert found is not None and found.step == 1
    assert len(damaged) == 1 and "step-000002" in damaged[0] and "damaged" in damaged[0]


def test_behind_a_damaged_one_the_good_ones_stay(tmp_path: Path) -> None:
    for step in (1, 9):
        save(tmp_path, at(step))
    save(tmp_path, at(2))
    assert saved(tmp_path) == ["step-000001", "step-000002"]


def test_when_all_are_damaged_all_are_named(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, at(step))
        (folder(tmp_path, step) / MODEL).write_bytes(b"")
    with pytest.raises(QuickmergeError, match=r"no checkpoint in .* is whole: .*step-000002.*step-000001"):
        newest(tmp_path)


# safetensors has an error of its own for what its own writing meets.
ERRORS = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("at_file", [1, 2])
def test_a_full_disk_leaves_the_checkpoints_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_file: int, error: Exception
) -> None:
    for step in (1, 2):
        save(tmp_path, at(step))
    real, calls = checkpoint.save_file, []

    def full(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at_file:
            raise error
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(QuickmergeError) as caught:
        save(tmp_path, at(3))
    assert str(folder(tmp_path, 3)) in str(caught.value) and "No space left on device" in str(caught.value)
    assert saved(tmp_path) == ["step-000001", "step-000002"]
    assert load(folder(tmp_path, 2)).step == 2
