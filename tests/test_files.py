import errno
import os
from pathlib import Path
from typing import Any

import pytest

from quickmerge.errors import QuickmergeError
from quickmerge.files import settle, write_bytes, write_folder, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_is_written_and_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    write_folder(target, lambda work: write_json(work / "sub" / "one.json", {"a": 1}))
    assert (target / "sub" / "one.json").read_text() == '{\n "a": 1\n}\n'
    write_folder(target, lambda work: write_bytes(work / "two", b"2"))
    assert names(target) == ["two"] and names(target.parent) == ["target"]


def test_what_fails_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "target"
    write_folder(target, lambda work: write_bytes(work / "old", b""))

    def fill(work: Path) -> None:
        write_bytes(work / "new", b"")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(QuickmergeError) as caught:
        write_folder(target, fill)
    assert str(target) in str(caught.value) and "No space left on device" in str(caught.value)
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_a_swap_that_fails_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    write_folder(target, lambda work: write_bytes(work / "old", b""))
    rename, calls = os.rename, []

    def second_fails(*paths: Any) -> None:
        calls.append(paths)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(*paths)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(QuickmergeError, match="Input/output error"):
        write_folder(target, lambda work: write_bytes(work / "new", b""))
    assert names(tmp_path) == ["target"] and names(target) == ["old"]


def test_settling_touches_only_what_it_is_told_to(tmp_path: Path) -> None:
    for name in (".a.x.tmp", ".a.b.x.tmp", ".a.y.old", ".c.x.old", ".a.json", "a"):
        (tmp_path / name).mkdir()
    settle(tmp_path, "a")
    assert names(tmp_path) == [".a.b.x.tmp", ".a.json", ".c.x.old", "a"]
    settle(tmp_path)
    assert names(tmp_path) == [".a.json", "a", "c"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(QuickmergeError, match="No space left"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]
