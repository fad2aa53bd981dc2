import builtins
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transplant_samples import model_folder, same_bits, tensors

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes
from quickmerge.transplant import writer
from quickmerge.transplant.checkpoint import Checkpoint, file_sha256, open_checkpoint, tensor_piece
from quickmerge.transplant.writer import MANIFEST, check_out, write_model

NAME = "model.embed_tokens.weight"


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(model_folder(tmp_path / "base", shard="20KB"))


def finish(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    write_bytes(folder / MANIFEST, json.dumps(files).encode())


def write(base: Checkpoint, out: Path, rows: int = 5, **more: Any) -> None:
    write_model(out, base, {NAME: tensor_piece(NAME, torch.ones(rows, 32))}, finish, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_all_but_the_replaced_tensor_stay_as_they_are(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    amounts: list[int] = []
    side = {"more.safetensors": (tensor_piece("x", torch.arange(3)),)}
    write(base, out, side=side, total=amounts.append, advance=lambda amount: amounts.append(-amount))
    old, new = tensors(base.folder), tensors(out)
    assert old.keys() == new.keys() and torch.equal(new.pop(NAME), torch.ones(5, 32))
    assert all(same_bits(new[name], old[name]) for name in new)
    assert sum(amounts) == 0 and amounts[0] == sum(v.nbytes for v in new.values()) + 5 * 32 * 4 + 24
    files = json.loads((out / MANIFEST).read_text())
    assert set(files) == {*base.files, "transplant/more.safetensors"}
    assert all(
        files[name] == {"bytes": (out / name).stat().st_size, "sha256": file_sha256(out / name)} for name in files
    )
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == amounts[0] - 24 and set(index["weight_map"]) == set(old)
    assert names(tmp_path) == ["base", "out"]


def fail_in(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> list[str]:
    """Let the ``number``-th file of weights fail half-way; the list grows by the name of each that is begun."""
    begun: list[str] = []
    real = writer.write_safetensors

    def write_safetensors(path: Path, pieces: Any, advance: Any = None) -> str:
        begun.append(path.name)
        if len(begun) == number:
            path.write_bytes(b"half")
            raise error
        return real(path, pieces, advance)

    monkeypatch.setattr(writer, "write_safetensors", write_safetensors)
    return begun


def test_a_full_disk_is_one_sentence_and_a_later_run_goes_on(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_in(patch, 4, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        with pytest.raises(QuickmergeError, match=r"out can't be written \(No space left on device\); finished files"):
            write(base, out)
    assert not out.exists()
    with monkeypatch.context() as patch:
        begun = fail_in(patch, 99, OSError())
        write(base, out)
    assert begun == sorted(base.files)[3:] and torch.equal(tensors(out)[NAME], torch.ones(5, 32))
    assert names(tmp_path) == ["base", "out"]


def test_an_interrupted_run_is_gone_on_with_only_where_nothing_has_changed(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupted() -> None:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            fail_in(patch, 4, KeyboardInterrupt())
            write(base, out)

    interrupted()
    with monkeypatch.context() as patch:  # other rows: all again
        begun = fail_in(patch, 99, OSError())
        write(base, out, rows=6)
    assert len(begun) == len(base.files)
    interrupted()
    work = tmp_path / ".out.transplant"
    damaged = sorted(work.glob("*.safetensors"))[1]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    with monkeypatch.context() as patch:  # a damaged file: that one again, and those that were not there
        begun = fail_in(patch, 99, OSError())
        write(base, out)
    assert len(begun) == len(base.files) - 2 and damaged.name in begun
    assert len(tensors(out)[NAME]) == 5 and names(tmp_path) == ["base", "out"]


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    base: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 2**20})())
    with pytest.raises(QuickmergeError, match=r"No space left on device: 0 MB needed, 1 free"):
        write(base, tmp_path / "out")
    assert names(tmp_path) == ["base"]


def test_what_fails_at_the_end_leaves_the_old_folder(base: Checkpoint, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write(base, out)

    def fail(folder: Path, files: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(QuickmergeError, match="No space left"):
        write_model(out, base, {NAME: tensor_piece(NAME, torch.ones(6, 32))}, fail)
    assert len(tensors(out)[NAME]) == 5


def test_one_run_at_a_time(base: Checkpoint, tmp_path: Path) -> None:
    def again(folder: Path, files: Any) -> None:
        with pytest.raises(QuickmergeError, match=r"one run at a time, but process \d+ \(this one\) writes it"):
            write(base, tmp_path / "out")
        finish(folder, files)

    write_model(tmp_path / "out", base, {}, again)


def test_nothing_of_the_users_is_overwritten(base: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(QuickmergeError, match="another folder than those that are read"):
        check_out(base.folder, base.folder)
    with pytest.raises(QuickmergeError, match="which holds others"):
        check_out(base.folder)
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(QuickmergeError, match="got the file"):
        check_out(file)
    with pytest.raises(QuickmergeError, match="can't be written"):
        check_out(file / "out")
    write(base, tmp_path / "out")
    check_out(tmp_path / "out", base.folder)
    check_out(tmp_path / "new" / "out")
    assert builtins.sorted(names(tmp_path)) == ["base", "file", "new", "out"]


def test_what_the_user_put_beside_or_into_a_transplant_stays(base: Checkpoint, tmp_path: Path) -> None:
    out, own = tmp_path / "out", tmp_path / ".out.transplant"
    own.mkdir()
    (own / "precious").write_text("mine")
    for attempt in (lambda: check_out(out), lambda: write(base, out)):
        with pytest.raises(QuickmergeError, match="is in the way"):
            attempt()
    assert names(own) == ["precious"]
    (own / "precious").unlink()
    side = {"more.safetensors": (tensor_piece("x", torch.arange(3)),)}
    write(base, out, side=side)
    (out / "notes.txt").write_text("mine")
    (out / "model-00001-of-00099.safetensors").write_bytes(b"of an earlier one")
    check_out(out)
    write(base, out, rows=7)
    assert tensors(out)[NAME].shape == (7, 32) and (out / "notes.txt").read_text() == "mine"
    assert not (out / "model-00001-of-00099.safetensors").exists() and not (out / "transplant").exists()
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    write(base, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real" / MANIFEST).is_file()
    assert names(tmp_path / "disk") == ["real"]
