"""Files that are replaced together: a kill at any moment leaves the old ones or the new ones, and nothing else."""

import contextlib
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.files import write_bytes
from quickmerge.staging import new_stage
from quickmerge.together import ENDING, LIST, NAME, complete, write_together

STALE = re.compile(r"part-\d\.bin|sub/part-\d\.bin")
OLD = {"config": b"old", "part-1.bin": b"old", "sub/part-1.bin": b"old", "sub/part-2.bin": b"old"}
NEW = {"config": b"new", "part-2.bin": b"new", "sub/part-1.bin": b"new", "deep/er/one": b"new"}
MINE = {"notes.txt": b"mine", "sub/notes.txt": b"mine", ".config.old": b"mine"}


def put(folder: Path, files: dict[str, bytes]) -> None:
    def fill(work: Path) -> None:
        for name, data in files.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            write_bytes(work / name, data)

    write_together(folder, fill, STALE)


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun(folder: Path) -> None:
    put(folder, OLD)
    for name, data in MINE.items():
        (folder / name).write_bytes(data)


def test_files_are_replaced_together_and_others_stay(tmp_path: Path) -> None:
    begun(tmp_path)
    put(tmp_path, NEW)
    assert content(tmp_path) == {**NEW, **MINE}
    put(tmp_path / "made" / "anew", NEW)
    assert content(tmp_path / "made" / "anew") == NEW
    (tmp_path / "link").symlink_to(tmp_path / "made" / "anew")
    put(tmp_path / "link", OLD)
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "made" / "anew") == {**OLD, "deep/er/one": b"new"}


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run in a process that is killed before its change of the disk with this number; False if there is none."""
    child = os.fork()
    if child == 0:
        left = [number]

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "fsync"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, status
    return os.WIFSIGNALED(status)


def test_a_kill_before_any_change_leaves_the_old_files_or_the_new(tmp_path: Path) -> None:
    seen = set()
    for number in range(1, 500):
        folder = tmp_path / str(number)
        begun(folder)
        killed = killed_at(number, lambda folder=folder: put(folder, NEW))
        complete(folder)
        found = {name: data for name, data in content(folder).items() if ENDING not in name and "-part" not in name}
        assert found in ({**OLD, **MINE}, {**NEW, **MINE}), number
        seen.add(found["config"])
        put(folder, NEW)  # whoever comes next leaves nothing of it
        assert content(folder) == {**NEW, **MINE}, number
        if not killed:
            break
    assert number > 20 and seen == {b"old", b"new"}


def test_a_fill_that_fails_changes_nothing(tmp_path: Path) -> None:
    begun(tmp_path)

    def fill(work: Path) -> None:
        (work / "config").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(QuickmergeError, match="No space left"):
        write_together(tmp_path, fill)
    assert content(tmp_path) == {**OLD, **MINE}


def test_two_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    begun(tmp_path)

    def fill(work: Path) -> None:
        with pytest.raises(QuickmergeError, match="being written by another process"):
            put(tmp_path, OLD)
        write_bytes(work / "config", b"new")

    write_together(tmp_path, fill)
    assert content(tmp_path) == {**OLD, **MINE, "config": b"new"}


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/../../evil", "", "link/evil", "..", "notes.txt/evil"])
def test_a_strangers_list_reaches_nothing_outside_its_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    (folder / "link").parent.mkdir()
    (folder / "link").symlink_to(tmp_path)
    for entries in ({"files": [name], "stale": []}, {"files": [], "stale": [name]}):
        stage = new_stage(folder, NAME, ENDING)
        (stage.new / "evil").write_bytes(b"x")
        (tmp_path / "evil").write_bytes(b"mine")
        (stage.folder / LIST).write_text(json.dumps(entries))
        if name == "notes.txt/evil":
            (folder / "notes.txt").write_text("a file")
        with contextlib.suppress(QuickmergeError):
            complete(folder)
        stage.remove()
        assert (tmp_path / "evil").read_bytes() == b"mine" and not Path("/tmp/evil").exists()
